"""What goes wrong is said clearly, by every rank."""

from pathlib import Path
from typing import Any

import pytest

from trainer.engine.gangs import DP2, TP2, Run, gang, train


@pytest.mark.parametrize("layout", [TP2, DP2], ids=["TP2", "DP2"])
def test_a_model_that_diverged_ends_the_run_with_a_remedy(tmp_path: Path, layout: dict[str, int]) -> None:
    run = Run(folder=tmp_path, steps=10, every=1, learning_rate=1e30)
    ended = train(run, layout)
    assert [e.error for e in ended] == ["UserError", "UserError"]
    assert "an older checkpoint is not there: lower schedule.learningRate (1e+30)" in ended[0].message


def ask_for_fp8(rank: int, world: int) -> None:
    from headrace_api.stages.training import Precision
    from headrace_trainer.engine.model.build import check_precision

    check_precision(Precision.FP8)


def test_fp8_without_a_gpu_names_the_field() -> None:
    ended = gang(ask_for_fp8, 1)
    assert ended[0].error == "UserError"
    assert ended[0].message.startswith("precision: 'fp8': found no GPU: use bf16")


@pytest.mark.parametrize(
    ("trouble", "named"), [({"full_at": 3}, "rank 1: "), ({"first_is_full": True}, "rank 0: ")], ids=["last", "first"]
)
def test_a_disk_that_stays_full_is_a_storage_error_on_every_rank(
    tmp_path: Path, trouble: dict[str, Any], named: str
) -> None:
    ended = train(Run(folder=tmp_path, steps=8, every=4, **trouble), TP2)
    assert [e.error for e in ended] == ["StorageError", "StorageError"]
    assert all(named in e.message for e in ended)
    assert "check that the scratch volume has space" in ended[0].message
    assert not list((tmp_path / "storage").rglob("checkpoint.json"))
    assert not list(tmp_path.glob("scratch-1/checkpoints/*/*")), "what failed takes no space"


def committed(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in (folder / "storage").rglob("checkpoint.json"))


def test_a_disk_that_was_full_for_a_while_costs_only_the_checkpoints_of_that_time(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "full", steps=11, every=3, full_at=2, room_at=7)
    ended = train(run, TP2)
    assert [e.error for e in ended] == ["", ""], ended
    assert ended[0].value.message == "", "what is over is not told any more"
    assert committed(run.folder) == ["step-00000009-a1", "step-00000011-a1"]
    undisturbed = train(Run(folder=tmp_path / "whole", steps=11), TP2)
    assert ended[0].value.history == undisturbed[0].value.history


def test_a_writer_that_is_killed_costs_its_checkpoint_and_no_step(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, steps=9, every=4, writer_dies_before="step-00000004-a1/__0_0.distcp")
    ended = train(run, TP2)
    assert [e.error for e in ended] == ["", ""], ended
    assert committed(tmp_path) == ["step-00000008-a1", "step-00000009-a1"]


def test_a_last_checkpoint_whose_writer_is_killed_is_written_again(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, steps=4, writer_dies_before="step-00000004-a1/__0_0.distcp")
    ended = train(run, TP2)
    assert [e.error for e in ended] == ["", ""], ended
    assert committed(tmp_path) == ["step-00000004-a1-1"]


def test_writers_that_are_always_killed_are_a_storage_error_on_every_rank(tmp_path: Path) -> None:
    ended = train(Run(folder=tmp_path, steps=4, writer_dies_before="__0_0.distcp"), TP2)
    assert [e.error for e in ended] == ["StorageError", "StorageError"]
    assert "a checkpoint's writer ended with exit code -9" in ended[1].message
