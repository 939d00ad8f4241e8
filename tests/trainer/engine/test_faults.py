"""What goes wrong is said clearly, by every rank."""

from pathlib import Path

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


def test_a_full_disk_is_a_storage_error_on_every_rank(tmp_path: Path) -> None:
    ended = train(Run(folder=tmp_path, steps=8, every=4, full_at=3), TP2)
    assert [e.error for e in ended] == ["StorageError", "StorageError"]
    assert "rank 1: " in ended[0].message
    assert "check that the scratch volume has space" in ended[0].message
    assert not list((tmp_path / "storage").rglob("checkpoint.json"))


def test_a_writer_that_is_killed_is_a_storage_error_on_every_rank(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, steps=8, every=4, writer_dies_before="step-00000004-a1/__0_0.distcp")
    ended = train(run, TP2)
    assert [e.error for e in ended] == ["StorageError", "StorageError"]
    assert "a checkpoint's writer ended with exit code -9" in ended[1].message
    assert not list((tmp_path / "storage").rglob("checkpoint.json"))
