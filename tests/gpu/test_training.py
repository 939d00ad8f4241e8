"""Training on one GPU: Transformer Engine's kernels, every precision, bit-exact reruns, portable checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.engine.gangs import TP1, Run, gang, joined, train

RECIPES = ["delayed", "tensorwise", "blockwise"]
PRECISIONS = ["bf16", *RECIPES]
SHAPE = {"layers": 4, "hiddenSize": 256, "heads": 4, "kvHeads": 2, "ffnHiddenSize": 512}


def run_in(folder: Path, precision: str, **fields: Any) -> Run:
    """A training in bf16, or in fp8 by a recipe."""
    overrides = {"model": SHAPE}
    if precision in RECIPES:
        overrides |= {"fp8Recipe": precision}
    kind = "fp8" if precision in RECIPES else precision
    return Run(folder=folder, precision=kind, length=128, overrides=overrides, **fields)


def curve(run: Run) -> list[str]:
    """The losses of a run that must end well, with every bit."""
    (ended,) = train(run, TP1)
    assert not ended.error, ended
    return [record["loss_hex"] for record in ended.value.history]


def floats(losses: list[str]) -> list[float]:
    return [float.fromhex(loss) for loss in losses]


@contextmanager
def no_gpu(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ranks that are started in this block find none."""
    with patch.context() as inner:
        inner.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


def look_at_the_model(rank: int, world: int, run: Run) -> tuple[str, str, str]:
    def look(loop: Any, _ctx: Any, _card: Any) -> tuple[str, str, str]:
        layer = loop.state.model.module.decoder.layers[0]
        loop.start()
        exchange = loop._exchange(loop.stepper.losses(loop.validation.read(0, 1)))
        return type(layer.self_attention.linear_qkv).__name__, loop.gang.device.type, exchange._total.device.type

    return joined(rank, world, run, TP1, look)  # type: ignore[no-any-return]


def test_transformer_engine_computes_and_a_step_talks_over_nccl(tmp_path: Path) -> None:
    (ended,) = gang(look_at_the_model, 1, run_in(tmp_path, "bf16"))
    assert ended.value == ("TELayerNormColumnParallelLinear", "cuda", "cuda"), ended


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return curve(run_in(tmp_path_factory.mktemp("bf16"), "bf16", steps=40))


def test_bf16_learns_as_the_cpu_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_bf16: list[str]) -> None:
    with no_gpu(monkeypatch):
        expected = curve(run_in(tmp_path, "bf16", steps=40))
    assert floats(in_bf16) == pytest.approx(floats(expected), abs=0.05)
    assert floats(in_bf16)[-1] < floats(in_bf16)[0] - 0.5


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_learns_as_bf16_does(tmp_path: Path, in_bf16: list[str], recipe: str) -> None:
    losses = curve(run_in(tmp_path, recipe, steps=40))
    assert losses != in_bf16, "nothing was computed in fp8"
    assert floats(losses) == pytest.approx(floats(in_bf16), abs=0.1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_runs_and_a_resumed_one_are_the_same_bit_for_bit(tmp_path: Path, precision: str) -> None:
    first = curve(run_in(tmp_path / "first", precision, steps=12))
    assert curve(run_in(tmp_path / "second", precision, steps=12)) == first
    cut = run_in(tmp_path / "cut", precision, steps=12, stop_at=5)
    assert [e.error for e in train(cut, TP1)] == ["Stopped"]
    (resumed,) = train(replace(cut, stop_at=None, attempt=2), TP1)
    assert not resumed.error, resumed
    assert resumed.value.first_step > 0
    assert [record["loss_hex"] for record in resumed.value.history] == first


@pytest.mark.parametrize("first_on", ["cpu", "gpu"])
def test_a_checkpoint_moves_between_gpu_and_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_bf16: list[str], first_on: str
) -> None:
    cut = run_in(tmp_path, "bf16", steps=40, stop_at=20)
    rest = replace(cut, stop_at=None, attempt=2)
    if first_on == "cpu":
        with no_gpu(monkeypatch):
            stopped = train(cut, TP1)
        resumed = train(rest, TP1)
    else:
        stopped = train(cut, TP1)
        with no_gpu(monkeypatch):
            resumed = train(rest, TP1)
    assert [e.error for e in (*stopped, *resumed)] == ["Stopped", ""], (stopped, resumed)
    assert resumed[0].value.first_step > 0
    found = [record["loss"] for record in resumed[0].value.history]
    assert found == pytest.approx(floats(in_bf16), abs=0.05)
