"""Object names: readable, short enough for host names, and unique."""

import os
import random
import re

import pytest

from builders import manifest
from headrace_api.contract import served_model_name, service_name
from headrace_api.errors import ManifestError, parse_run
from headrace_api.run import MAX_NAMES
from headrace_operator.body.build.names import account_name, attempt_name

HOST_NAME = re.compile(r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (attempt_name("llama", "7b-base", 1), attempt_name("llama-7b", "base", 1)),
        (attempt_name("llama", "base", 1), service_name("llama", "base-1")),
        (attempt_name("llama", "base", 12), attempt_name("llama", "base-1", 2)),
        (service_name("llama", "7b-serve"), service_name("llama-7b", "serve")),
        (account_name("llama"), service_name("headrace", "llama-1")),
    ],
)
def test_names_that_look_alike_are_not_the_same(one, other):
    assert one != other


def test_no_two_things_of_random_runs_have_one_name():
    seed = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(10**6)))
    print(f"seed {seed}; set HEADRACE_TEST_SEED to repeat")
    draw = random.Random(seed)
    seen: dict[str, tuple[str, ...]] = {}
    for _ in range(20_000):
        run, stage = ("-".join(draw.choices(["a", "b", "1b", "a1"], k=draw.randint(1, 3))) for _ in range(2))
        if not run[0].isalpha() or not stage[0].isalpha():
            continue
        attempt = draw.choice([1, 2, 11, 12])
        for name, thing in (
            (attempt_name(run, stage, attempt), ("attempt", run, stage, str(attempt))),
            (service_name(run, stage), ("service", run, stage)),
        ):
            assert seen.setdefault(name, thing) == thing, seed
            assert HOST_NAME.match(name), name


def test_the_longest_names_fit_a_pods_host_name():
    run, stage = "r" * (MAX_NAMES // 2), "s" * (MAX_NAMES // 2)
    assert HOST_NAME.match(f"{attempt_name(run, stage, 99_999)}-19999")


@pytest.mark.parametrize(
    ("run", "stage", "name"),
    [("llama", "ship", "llama/ship"), ("a---b", "c-d", "a-b/c-d")],
)
def test_a_model_is_served_under_a_name_that_hugging_face_takes(run, stage, name):
    assert served_model_name(run, stage) == name


@pytest.mark.parametrize(
    ("field", "said"),
    [("run", "metadata.name: 'a--b': has two hyphens in a row"), ("stage", "spec.stages[0].name: 'a--b'")],
)
def test_two_hyphens_in_a_row_are_refused_with_the_field(field, said):
    value = manifest("corpus")
    (value["metadata"] if field == "run" else value["spec"]["stages"][0])["name"] = "a--b"
    with pytest.raises(ManifestError) as refused:
        parse_run(value)
    assert said in str(refused.value)
