"""Whose checkpoints a run goes on from: tables of what lies in storage and what the manifest says."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from headrace_api.artifact import canonical_digest
from headrace_api.stages.training import OnMismatch
from headrace_trainer.engine.checkpoint.choice import Choice, Training, choose, differences
from headrace_trainer.engine.checkpoint.manifest import Axes, CheckpointManifest

THIS = {
    "kind": "pretrain",
    "config": {"model": {"layers": 4}, "schedule": {"learningRate": 0.1}},
    "seed": 1,
    "inputs": {},
}
OTHER = {**THIS, "seed": 2}
HOME, THERE = canonical_digest(THIS)[:12], canonical_digest(OTHER)[:12]


def training(identity: dict[str, Any], step: int, *, of: int = 100, folder: str = "", age: int = 0) -> Training:
    newest = CheckpointManifest(
        stage="base",
        identity=identity,
        attempt=1,
        step=step,
        steps=of,
        consumed_samples=step,
        layout=Axes(tensor=1, pipeline=1, data=1),
        created_at=datetime(2026, 1, 1, tzinfo=UTC) - timedelta(hours=age),
        files=[],
    )
    return Training(folder=folder or canonical_digest(identity)[:12], newest=newest)


def chosen(*trainings: Training, steps: int = 100, restart: bool = False) -> Choice:
    return choose(THIS, trainings, steps=steps, on_mismatch=OnMismatch.RESTART if restart else OnMismatch.REFUSE)


@pytest.mark.parametrize(
    ("trainings", "folder"),
    [
        ([], HOME),
        ([training(THIS, 40)], HOME),
        ([training(THIS, 100)], HOME),
        ([training(THIS, 40, of=40)], HOME),
        ([training(OTHER, 40, age=-1), training(THIS, 40)], HOME),
        ([training(THIS, 200, of=200), training(THIS, 30, folder=f"{HOME}-2")], f"{HOME}-2"),
    ],
    ids=["nothing", "begun", "finished", "longer now", "two begun", "begun a second time"],
)
def test_work_that_fits_goes_on_and_nothing_is_said(trainings: list[Training], folder: str) -> None:
    assert chosen(*trainings) == Choice(folder=folder)


@pytest.mark.parametrize("restart", [False, True])
def test_finished_work_with_other_values_blocks_nothing_and_is_told_of(restart: bool) -> None:
    found = chosen(training(OTHER, 100), restart=restart)
    assert (found.folder, found.refusal) == (HOME, "")
    assert found.message == (
        f"began at step 0: the checkpoint of step 100 of 100 in checkpoints/{THERE} does not fit: seed: 2 there, 1 here"
    )


def test_unfinished_work_with_other_values_is_refused_by_name_with_two_ways_on() -> None:
    found = chosen(training(OTHER, 100, age=1), training(OTHER | {"seed": 3}, 40))
    assert "the checkpoint of step 40 of 100" in found.refusal
    assert "seed: 3 there, 1 here" in found.refusal
    assert "pretrain.checkpoint.onMismatch to restart" in found.refusal
    assert "another storage.uri" in found.refusal


def test_unfinished_work_is_left_behind_where_that_is_asked_for() -> None:
    found = chosen(training(OTHER, 40), restart=True)
    assert (found.folder, found.refusal) == (HOME, "")
    assert found.message.startswith("began at step 0: the checkpoint of step 40 of 100")


def test_a_shorter_run_goes_on_while_it_is_ahead_of_the_checkpoint() -> None:
    assert chosen(training(THIS, 40), steps=41) == Choice(folder=HOME)
    refused = chosen(training(THIS, 40), steps=39).refusal
    assert "tokens: this run ends at step 39, before it" in refused
    again = chosen(training(THIS, 40), steps=39, restart=True)
    assert (again.folder, again.refusal) == (f"{HOME}-2", "")
    assert "tokens: this run ends at step 39" in again.message


def test_a_run_that_is_shorter_than_a_finished_one_begins_beside_it() -> None:
    found = chosen(training(THIS, 100), steps=50)
    assert (found.folder, found.refusal) == (f"{HOME}-2", "")
    assert "step 100 of 100" in found.message


def test_differences_are_named_as_in_the_manifest() -> None:
    there = {
        "kind": "pretrain",
        "config": {"model": {"layers": 8}, "schedule": {"learningRate": 0.1, "minLearningRate": 0.01}},
        "seed": 1,
        "inputs": {"shards": "a" * 64},
    }
    here = THIS | {"inputs": {"shards": "b" * 64}}
    assert differences(there, here) == [
        "inputs.shards: aaaaaaaaaaaa there, bbbbbbbbbbbb here",
        "model.layers: 8 there, 4 here",
        "schedule.minLearningRate: 0.01 there, none here",
    ]
    assert differences(here, here) == []
