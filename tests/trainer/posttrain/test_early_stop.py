"""A stage that overfits stops early, and leaves the weights that were best on records that it has not seen."""

import json
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from headrace_api.artifact import ArtifactRef
from headrace_api.contract import ResolvedStage
from headrace_api.stages.finetune import EarlyStop
from headrace_trainer.artifacts import read_manifest
from headrace_trainer.engine.history import History
from headrace_trainer.engine.stopping import reason_to_stop
from headrace_trainer.storage import DirectoryStore
from trainer.engine.gangs import DP2, PP2, TP1, TP2, gang
from trainer.posttrain.chain import (
    Base,
    further,
    history,
    pairs_block,
    pretrained,
    reference,
    stage_rank,
    trained,
    write_records,
)
from trainer.posttrain.test_dpo import pairs
from trainer.posttrain.test_sft import WORDS

EVERY = 2
STOP = {"patience": 3, "minDelta": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"))


def riddles(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Questions whose answers follow no rule: what can be learned is their form, and then each by heart."""
    draw = random.Random(seed)
    return [
        {"prompt": f"Riddle {draw.randrange(10**6)}? ", "completion": " ".join(draw.choices(WORDS, k=4))}
        for _ in range(count)
    ]


def sft(base: Base, folder: Path, layout: dict[str, int] = TP1, *, attempt: int = 1, **fields: Any) -> ResolvedStage:
    """Thirty epochs of sixteen riddles."""
    data = write_records(folder / "riddles.jsonl", riddles(16, seed=0))
    held_out = write_records(folder / "others.jsonl", riddles(16, seed=1))
    block = {
        "from": {"model": "base"},
        "data": {"sources": [{"uri": str(data)}], "validation": {"uri": str(held_out)}},
        "epochs": 30,
        "sequenceLength": 64,
        "globalBatchSize": 8,
        "microBatchSize": 2,
        "packing": False,
        "precision": "fp32",
        "schedule": {"learningRate": 1e-2, "warmup": 2, "decay": "constant"},
        "validation": {"every": EVERY},
        "checkpoint": {"every": 3, "keep": 1},
        "samples": {"count": 0},
        "earlyStop": STOP,
    } | fields
    return further(base, folder, {"sft": block}, layout, name="sft", attempt=attempt)


def kept_in(records: list[dict[str, Any]]) -> int:
    """The step of the lowest held-out loss."""
    measured = [(r["validation_loss"], r["step"]) for r in records if "validation_loss" in r]
    return min(measured)[1]


def loss_of(model: ArtifactRef, base: Base, folder: Path, layout: dict[str, int], stage: ResolvedStage) -> float:
    """The held-out loss of a model that is trained at a rate at which no weight changes."""
    config = stage.stage.config.dump()
    for name in ("earlyStop", "keep", "adapter"):
        config.pop(name, None)
    config |= {"epochs": 0.5, "schedule": {"learningRate": 1e-30, "decay": "constant"}, "validation": {"every": 1}}
    again = further(
        Base(storage=base.storage, model=model, shards=base.shards), folder, {"sft": config}, layout, name="re"
    )
    return float(trained(again, folder)[0]["validation_loss"])


@pytest.fixture(scope="module")
def undisturbed(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, trained(sft(base, folder), folder)


def test_it_stops_once_it_only_learns_by_heart(base: Base, undisturbed: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, records = undisturbed
    last, kept = records[-1]["step"], kept_in(records)
    assert last == kept + STOP["patience"] * EVERY < 60
    assert records[-1]["stopped_early"].startswith(f"stopped early after step {last}: 3 measurements in a row")
    assert [r["step"] for r in records if r.get("kept")][-1] == kept
    assert records[-1]["validation_loss"] > records[kept - 1]["validation_loss"]
    assert records[-1]["loss"] < records[kept - 1]["loss"], "what it has seen it knows better and better"
    artifact = read_manifest(DirectoryStore(folder / "storage"), "sft/artifact.json")
    assert artifact is not None
    figures = artifact.metrics
    assert (figures["steps"], figures["keptStep"], figures["stoppedEarly"]) == (last, kept, 1)
    assert figures["validationLoss"] == records[kept - 1]["validation_loss"]


@pytest.mark.parametrize("layout", [TP1, TP2, PP2, DP2], ids=["one rank", "TP2", "PP2", "DP2"])
def test_the_weights_that_are_left_are_the_best_bit_for_bit(
    base: Base, tmp_path: Path, undisturbed: tuple[Path, list[dict[str, Any]]], layout: dict[str, int]
) -> None:
    """Also in bits: the loss of the artifact, measured again, is the one that was recorded."""
    _, expected = undisturbed
    stage = sft(base, tmp_path, layout)
    ended = gang(stage_rank, stage.stage.compute.world, stage, tmp_path)
    assert not any(e.error for e in ended), ended
    records = history(stage)
    assert (len(records), kept_in(records)) == (len(expected), kept_in(expected))
    best = records[kept_in(records) - 1]["validation_loss"]
    again = loss_of(reference(stage, ended[0]), base, tmp_path / "again", layout, stage)
    assert again.hex() == best.hex()


def test_adapters_too(base: Base, tmp_path: Path) -> None:
    """Merged, they are the same but for rounding."""
    stage = sft(
        base, tmp_path, TP2, adapter={"lora": {"rank": 8}}, schedule={"learningRate": 3e-2, "decay": "constant"}
    )
    ended = gang(stage_rank, 2, stage, tmp_path)
    assert not any(e.error for e in ended), ended
    records = history(stage)
    kept = kept_in(records)
    assert kept < records[-1]["step"]
    again = loss_of(reference(stage, ended[0]), base, tmp_path / "again", TP2, stage)
    assert again == pytest.approx(records[kept - 1]["validation_loss"], abs=1e-5)


def test_killed_around_the_best_measurement_it_ends_the_same(
    base: Base, tmp_path: Path, undisturbed: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder = tmp_path / "whole"
    whole = trained(sft(base, folder, DP2), folder)
    kept = kept_in(whole)
    seed = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(10**6)))
    print(f"HEADRACE_TEST_SEED={seed}")
    draw, attempt = random.Random(seed), 0
    for attempt, at in enumerate(sorted(draw.choices(range(kept - 1, kept + 4), k=3)), start=1):
        killed = gang(stage_rank, 2, sft(base, tmp_path, DP2, attempt=attempt), tmp_path, at)
        assert killed[-1].exit_code == -signal.SIGKILL
        check_the_best_is_there(tmp_path / "storage/sft/checkpoints")
    resumed = trained(sft(base, tmp_path, DP2, attempt=attempt + 1), tmp_path)
    assert [r["loss_hex"] for r in resumed] == [r["loss_hex"] for r in whole]
    assert [r.get("kept") for r in resumed] == [r.get("kept") for r in whole]
    assert weights(tmp_path) == weights(folder)


def check_the_best_is_there(folder: Path) -> None:
    """Whatever the newest checkpoint says is the best one is committed."""
    manifests = sorted(folder.glob("*/step-*/checkpoint.json"))
    if not manifests:
        return
    kept = History.loads((manifests[-1].parent / "history.jsonl").read_text()).kept_step
    steps = {json.loads(path.read_text())["step"] for path in manifests}
    assert kept is None or kept in steps


def weights(folder: Path) -> list[str]:
    """Digests of the files of the model that a stage left."""
    artifact = read_manifest(DirectoryStore(folder / "storage"), "sft/artifact.json")
    assert artifact is not None
    return [f.sha256 for f in artifact.files if f.path.startswith("checkpoint/") and f.path.endswith(".distcp")]


def test_the_last_weights_are_left_where_that_is_asked_for(base: Base, tmp_path: Path) -> None:
    stage = sft(base, tmp_path, keep="last")
    ended = gang(stage_rank, 1, stage, tmp_path)
    records = history(stage)
    assert not any(r.get("kept") for r in records)
    again = loss_of(reference(stage, ended[0]), base, tmp_path / "again", TP1, stage)
    assert again.hex() == records[-1]["validation_loss"].hex()


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_stages_on_pairs_keep_their_best_weights(base: Base, tmp_path: Path, kind: str) -> None:
    """Without a stop: all epochs are gone through."""
    data = write_records(tmp_path / "pairs.jsonl", pairs(60))
    fields = {"epochs": 3, "keep": "best", "validation": {"every": 4}}
    if kind == "dpo":
        fields["samples"] = {"count": 0}
    block = pairs_block(data, **fields, schedule={"learningRate": 2e-2, "decay": "constant"})
    stage = further(base, tmp_path, {kind: block}, TP1, name="tuned")
    (ended,) = gang(stage_rank, 1, stage, tmp_path)
    assert not ended.error, ended
    records, figures = history(stage), ended.value.metrics
    assert figures["keptStep"] == kept_in(records)
    assert figures["validationLoss"] == min(r["validation_loss"] for r in records if "validation_loss" in r)
    assert "stoppedEarly" not in figures
    assert figures["accuracy"] == pytest.approx(
        records[kept_in(records) - 1][f"validation_{'rewards/accuracies' if kind == 'dpo' else 'accuracy'}"]
    )


def test_work_that_stopped_early_is_finished_and_hinders_no_other(
    base: Base, tmp_path: Path, undisturbed: tuple[Path, list[dict[str, Any]]]
) -> None:
    trained(sft(base, tmp_path), tmp_path)
    other = sft(base, tmp_path, attempt=2, schedule={"learningRate": 5e-3, "decay": "constant"})
    assert len(trained(other, tmp_path)) > 2


def test_more_patience_goes_on_from_where_it_stopped(base: Base, tmp_path: Path) -> None:
    first = trained(sft(base, tmp_path), tmp_path)
    more = trained(sft(base, tmp_path, attempt=2, earlyStop={"patience": 5}), tmp_path)
    assert [r["loss_hex"] for r in more[: len(first)]] == [r["loss_hex"] for r in first]
    assert len(more) > len(first)


# The decision ----------------------------------------------------------------------------------------------------


def measured(*losses: float | None) -> list[dict[str, Any]]:
    return [
        {"step": i, "loss": 1.0} | ({} if loss is None else {"validation_loss": loss})
        for i, loss in enumerate(losses, start=1)
    ]


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "stops"),
    [
        ([], 1, 0, False),
        ([1.0], 1, 0, False),
        ([1.0, 1.0], 1, 0, True),
        ([1.0, 0.9], 1, 0, False),
        ([1.0, 1.1, 0.9, 1.0], 2, 0, False),
        ([1.0, 1.1, 0.9, 1.0, 0.95], 2, 0, True),
        ([1.0, 0.95, 0.91], 2, 0.1, True),
        ([1.0, 0.95, 0.89], 2, 0.1, False),
        ([1.0, None, None, None], 1, 0, False),
        ([1.0, None, 1.2, None], 1, 0, False),
        ([1.0, None, 1.2], 1, 0, True),
    ],
)
def test_it_stops_after_measurements_in_a_row_without_an_improvement(
    losses: list[float | None], patience: int, min_delta: float, stops: bool
) -> None:
    reason = reason_to_stop(measured(*losses), EarlyStop(patience=patience, min_delta=min_delta))
    assert (reason is not None) is stops
    assert reason_to_stop(measured(*losses), None) is None


def test_only_a_lower_loss_is_better_and_what_is_lost_is_not_kept() -> None:
    kept = History()
    found = []
    for loss in (2.0, 2.5, 1.5, 1.5, 1.0):
        step = len(kept.records) + 1
        kept.add(step=step, loss=1.0, grad_norm=1.0, learning_rate=1e-3, tokens=step)
        kept.add_validation(loss)
        found.append(kept.note_best())
    assert found == [True, False, True, False, True]
    assert (kept.kept_step, kept.validation_loss) == (5, 1.0)
    kept.note_lost(5)
    assert (kept.kept_step, kept.validation_loss) == (3, 1.5)
    kept.note_lost(-1)
    assert kept.kept_step == 3
    assert not math.isnan(kept.held_out("loss") or math.nan)
