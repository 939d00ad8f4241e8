"""What people write, and what it means."""

import json

import pytest
from pydantic import TypeAdapter, ValidationError

from builders import STAGES, make_run, manifest, succeeded
from headrace_api.artifact import Artifact, ArtifactFile, canonical_digest, resume_identity, stage_hash
from headrace_api.base import Cadence, Figures, Quantity, parse_duration
from headrace_api.contract import ResolvedStage, join_uri
from headrace_api.faults import ExitCode, FaultClass, Outcome, classify, most_telling
from headrace_api.model import PRESETS, padded_vocab
from headrace_api.planning import estimate_training
from headrace_api.run import TrainingRun, as_object
from headrace_api.stages import KINDS, Pretrain
from headrace_api.stages.evaluate import meets

STEP = make_run().spec.stages[3].pretrain
assert STEP is not None


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("140G", 140 * 10**9),
        ("2M", 2_000_000),
        ("1.5k", 1500),
        ("64Mi", 2**26),
        (7, 7),
        ("7", 7),
        ("2.05M", 2_050_000),
        ("1.1G", 1_100_000_000),
        ("0.29T", 290_000_000_000),
        ("7B", 7 * 10**9),
        ("1.5Gi", 3 * 2**29),
    ],
)
def test_quantities(written, meant):
    assert TypeAdapter(Quantity).validate_python(written) == meant


@pytest.mark.parametrize(
    "written", ["", "1X", "-1", "1.2345k", "G", "1.3Gi", "1.5", " 1M", "1M\n", "\u0663", "1e6", "1_000"]
)
def test_what_is_no_quantity(written):
    with pytest.raises(ValidationError):
        TypeAdapter(Quantity).validate_python(written)


@pytest.mark.parametrize(("written", "meant"), [("30m", 1800.0), ("1.5h", 5400.0), ("250ms", 0.25)])
def test_durations(written, meant):
    assert parse_duration(written) == meant


@pytest.mark.parametrize("written", ["", "30", "m", "1h30m", " 30m", "30m\n", "-1s", "1.2345s", "1e3s", "30M"])
def test_what_is_no_duration(written):
    with pytest.raises(ValueError, match="write a number with a unit"):
        parse_duration(written)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"loss": 2, "text": "x", "none": None, "nan": float("nan"), "inf": float("inf"), "huge": 10**400}, {"loss": 2.0}),
        ({"loss": "2.5"}, {"loss": 2.5}),
        ({}, {}),
    ],
)  # fmt: skip
def test_only_finite_figures_are_kept(written, meant):
    assert TypeAdapter(Figures).validate_python(written) == meant


@pytest.mark.parametrize(
    ("base", "parts", "joined"),
    [
        ("s3://bucket/runs", ("base",), "s3://bucket/runs/base"),
        ("s3://bucket/runs//", ("base", "a//b/"), "s3://bucket/runs/base/a/b"),
        ("s3://bucket/X/", ("base",), "s3://bucket/X/base"),
        ("/store", (), "/store"),
        ("file:///store/", ("x",), "file:///store/x"),
    ],
)
def test_addresses_are_joined_with_single_slashes(base, parts, joined):
    assert join_uri(base, *parts) == joined


def test_a_digest_is_the_same_in_every_version():
    """What finished stages are known by: another spelling would make all of them again."""
    value = {"b": [1, 2.5, None, True], "a": "\u00e9", "A": {}}
    assert canonical_digest(value) == "be9f4968412a4d777fa72add01f8b24d8d5eb0569264659092fdabc8847526ba"
    assert canonical_digest(dict(reversed(value.items()))) == canonical_digest(value)


@pytest.mark.parametrize(("written", "meant"), [(100, 100), ("100", 100), ("30m", "30m")])
def test_cadences_are_steps_or_time(written, meant):
    assert TypeAdapter(Cadence).validate_python(written) == meant


@pytest.mark.parametrize(
    "written", [0, "0", "0s", "0.0m", -1, True, 1.5, "soon", "-5m", "", 10**9, "9" * 12, "\u0663m"]
)
def test_what_is_no_cadence(written):
    with pytest.raises(ValidationError):
        TypeAdapter(Cadence).validate_python(written)


def test_a_run_survives_a_round_trip():
    run = make_run()
    assert TrainingRun.model_validate(run.dump()) == run
    assert TrainingRun.model_validate(json.loads(run.model_dump_json(by_alias=True))) == run
    assert as_object(run) == {k: v for k, v in run.dump().items() if k in manifest()}, "without its status"


def test_what_a_pod_reads_is_what_the_planner_wrote():
    run = make_run()
    for stage in run.spec.stages:
        resolved = ResolvedStage(
            run="demo", stage=stage, attempt=1, seed=1, hash="h", storage=run.spec.storage, output_uri="/store/x"
        )
        text = resolved.model_dump_json(by_alias=True, exclude_none=True)
        assert ResolvedStage.model_validate_json(text) == resolved


def test_every_kind_says_what_it_gives_and_how_it_runs():
    for name, kind in KINDS.items():
        assert name == kind.KIND
        assert kind.GIVES
        assert kind.RUNS_AS


def test_the_hash_follows_the_block_the_seed_and_the_inputs_and_nothing_else():
    config = make_run().spec.stages[0].config
    base = stage_hash(config, seed=1, inputs={"corpus": "a"})
    assert base == stage_hash(config, seed=1, inputs={"corpus": "a"})
    assert base != stage_hash(config, seed=2, inputs={"corpus": "a"})
    assert base != stage_hash(config, seed=1, inputs={"corpus": "b"})
    assert base != stage_hash(config.model_copy(update={"languages": ["en"]}), seed=1, inputs={"corpus": "a"})


def _changed(**fields: object) -> Pretrain:
    block = STAGES["base"]["pretrain"]
    return Pretrain.model_validate(block | fields)


_BASE = _changed()


@pytest.mark.parametrize(
    "fields",
    [
        {"parallelism": {"tensor": 1, "pipeline": 2}},
        {"microBatchSize": 4},
        {"checkpoint": {"every": "30m", "keep": 5, "onMismatch": "restart"}},
        {"validation": {"every": 7, "samples": 3}},
        {"from": {"shards": "renamed"}},
        {"model": PRESETS["llama-nano"].dump()},
    ],
    ids=lambda fields: str(next(iter(fields))),
)
def test_how_a_model_is_trained_changes_neither_the_result_nor_what_a_checkpoint_fits(fields):
    other = _changed(**fields)
    inputs = {"shards": "a"}
    assert stage_hash(other, seed=1, inputs=inputs) == stage_hash(_BASE, seed=1, inputs=inputs)
    assert resume_identity(other, seed=1, inputs=inputs) == resume_identity(_BASE, seed=1, inputs=inputs)


def test_another_seed_is_another_result_from_other_checkpoints():
    assert resume_identity(_BASE, seed=2, inputs={}) != resume_identity(_BASE, seed=1, inputs={})


def test_a_longer_run_is_another_result_that_goes_on_from_the_same_checkpoint():
    longer = _changed(tokens="2M")
    assert stage_hash(longer, seed=1, inputs={}) != stage_hash(_BASE, seed=1, inputs={})
    assert resume_identity(longer, seed=1, inputs={}) == resume_identity(_BASE, seed=1, inputs={})


@pytest.mark.parametrize(
    "fields",
    [
        {"model": {"preset": "llama-nano", "layers": 8}},
        {"sequenceLength": 64},
        {"globalBatchSize": 32},
        {"precision": "bf16"},
        {"schedule": {"learningRate": 1e-3}},
        {"optimizer": {"beta2": 0.99}},
    ],
    ids=lambda fields: str(next(iter(fields))),
)
def test_what_is_trained_changes_both(fields):
    other = _changed(**fields)
    assert stage_hash(other, seed=1, inputs={}) != stage_hash(_BASE, seed=1, inputs={})
    assert resume_identity(other, seed=1, inputs={}) != resume_identity(_BASE, seed=1, inputs={})


def test_an_artifacts_digest_is_what_it_is_and_not_when_it_was_made():
    file = ArtifactFile(path="a", bytes=1, sha256="0" * 64)
    made = {"kind": "corpus", "run": "r", "stage": "s", "hash": "h", "files": [file], "duration_seconds": 1.0}
    first = Artifact.model_validate(made | {"created_at": "2026-01-01T00:00:00Z"})
    later = Artifact.model_validate(
        made | {"created_at": "2026-02-01T00:00:00Z", "run": "other", "duration_seconds": 9}
    )
    other = Artifact.model_validate(
        made | {"created_at": "2026-01-01T00:00:00Z", "files": [file.model_copy(update={"sha256": "1" * 64})]}
    )
    assert first.digest == later.digest
    assert first.digest != other.digest


@pytest.mark.parametrize(
    ("name", "vocab", "published"),
    [("llama-7b", 32_000, 6_738_415_616), ("llama-8b", 128_256, 8_030_261_248), ("llama-70b", 128_256, 70_553_706_496)],
)
def test_presets_have_the_published_number_of_parameters(name, vocab, published):
    assert PRESETS[name].num_parameters(vocab) == published


def test_the_vocabulary_has_one_width_for_every_layout():
    assert [padded_vocab(n) for n in (1, 1024, 1025, 50257)] == [1024, 1024, 2048, 51200]


def test_the_estimate_is_six_operations_a_parameter_and_token():
    estimate = estimate_training(STEP, STEP.model.architecture, num_ranks=2, vocab_size=4096, on_gpus=False)
    assert estimate.flops == 6 * estimate.parameters * estimate.tokens
    assert estimate.steps == -(-1_000_000 // (128 * 16))


@pytest.mark.parametrize(
    ("bound", "value", "holds"), [(">=3", 3, True), (">=3", 2.99, False), ("<40", 40, False), ("<= 40", 40, True), (">1", 1, False)]
)  # fmt: skip
def test_requirements_compare(bound, value, holds):
    assert meets(bound, value) is holds


@pytest.mark.parametrize(
    ("code", "pod", "fault", "reason", "message"),
    [
        (ExitCode.OK, "", None, "Succeeded", ""),
        (ExitCode.USER, "", FaultClass.USER, "ExitCode", "exit code 2, without a termination message"),
        (ExitCode.STORAGE, "", FaultClass.STORAGE, "ExitCode", "exit code 74, without a termination message"),
        (ExitCode.STOPPED, "", FaultClass.STOPPED, "ExitCode", "exit code 75, without a termination message"),
        (1, "", FaultClass.PROCESS, "ExitCode", "exit code 1, without a termination message"),
        (127, "", FaultClass.PROCESS, "ExitCode", "exit code 127, without a termination message"),
        (128, "", FaultClass.POD, "ExitCode", "exit code 128, without a termination message"),
        (137, "OOMKilled", FaultClass.POD, "OOMKilled", "exit code 137, without a termination message"),
        (None, "Evicted", FaultClass.POD, "Evicted", "the pod is gone, without a termination message"),
        (None, "", FaultClass.POD, "Vanished", "the pod is gone, without a termination message"),
    ],
)
def test_exit_codes_have_one_class_each(code, pod, fault, reason, message):
    outcome = classify(code, pod_reason=pod) if pod else classify(code)
    assert outcome == Outcome(fault=fault, reason=reason, message=message)


def test_the_most_telling_failure_is_the_one_that_explains_the_others():
    peer = Outcome(fault=FaultClass.PROCESS, message="connection closed by peer")
    data = Outcome(fault=FaultClass.USER, message="line 7 is not JSON")
    assert most_telling([peer, succeeded(), data]) is data
    assert most_telling([succeeded()]) is None
