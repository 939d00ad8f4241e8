"""Ten thousand manifests, most of them invalid: the result is always a run, or lines that say where and what to do."""

import random
import re

import pytest

from headrace_api.errors import ManifestError, load_run, parse_run
from headrace_api.words import UNKNOWN
from manifests import Manifests, as_text, seed_of_this_test

COUNT = 10_000
FOREIGN = re.compile(
    r"Input should|should be a valid|pydantic|Extra inputs|Field required|https?://errors|Traceback|type=|<class"
)
FIELD = re.compile(r"^(apiVersion|kind|metadata|spec|line \d+|\S+ objects?|holds|a list|'|\d|byte|null|true|false)")


def check(problem: str) -> None:
    """A line names a field and a remedy, in words of ours, and is one line."""
    assert problem.isprintable(), problem
    assert not FOREIGN.search(problem), problem
    assert UNKNOWN not in problem, f"an error has no words: {problem}"
    assert FIELD.match(problem) or "unknown field" in problem, f"names no field: {problem}"
    where, separator, rest = problem.partition(": ")
    assert where and separator and len(rest) > 5, f"has no remedy: {problem}"
    assert len(problem) < 1000, problem


@pytest.mark.slow
def test_whatever_a_file_holds_is_a_run_or_clear_words(tmp_path):
    rng = random.Random(seed_of_this_test())
    source, path, valid = Manifests(rng), tmp_path / "run.yaml", 0
    for i in range(COUNT):
        text = as_text(source.mutated(), rng)
        path.write_bytes(text)
        try:
            load_run(path)
            valid += 1
        except ManifestError as error:
            assert error.problems
            for problem in error.problems:
                check(problem.removeprefix(f"{path}: "))
        except Exception as error:
            raise AssertionError(f"manifest {i}, {source.done}: {text[:2000]!r}") from error
    assert COUNT // 20 < valid < COUNT * 3 // 4, f"{valid} of {COUNT} were valid: the generator has lost its bite"


def test_whatever_an_object_holds_is_a_run_or_clear_words():
    rng = random.Random(seed_of_this_test())
    source = Manifests(rng)
    for i in range(1_000):
        value = source.mutated()
        try:
            parse_run(value)
        except ManifestError as error:
            for problem in error.problems:
                check(problem)
        except Exception as error:
            raise AssertionError(f"manifest {i}, {source.done}: {value!r:.2000}") from error
