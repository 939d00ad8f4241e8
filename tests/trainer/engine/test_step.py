"""What a step does beside the arithmetic: communication while it computes, no waiting, garbage left for later."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.engine.gangs import DP2, PP2, TP1, TP2, Run, gang, losses, train, train_rank
from trainer.engine.test_model import read_tensors

SMALL = 30_000
"""Parameters in a bucket: the model fills about six."""


@contextmanager
def noted(owner: Any, name: str, note: Callable[..., None]) -> Iterator[None]:
    """Call ``note`` with the arguments of every call of ``owner.name``, before it."""
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, original)


def curve(ended: list[Any]) -> list[str]:
    assert not any(e.error for e in ended), ended
    return [record["loss_hex"] for record in ended[0].value.history]


def test_many_buckets_change_neither_losses_nor_saved_weights(tmp_path: Path) -> None:
    one, two = Run(folder=tmp_path / "one", steps=8), Run(folder=tmp_path / "two", steps=8, bucket_size=SMALL)
    assert losses(two, DP2) == pytest.approx(losses(one, TP1), abs=1e-5, rel=0)
    expected = read_tensors(one.folder / "scratch-1" / "output" / "checkpoint")
    found = read_tensors(two.folder / "scratch-1" / "output" / "checkpoint")
    assert found.keys() == expected.keys()
    # A weight whose last update was not gathered is off by about the last learning rate, 3e-4.
    assert max((found[key] - expected[key]).abs().max().item() for key in found) < 1e-4


def test_many_buckets_are_resumed_bit_for_bit(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "whole", steps=9, bucket_size=SMALL)
    whole = curve(train(run, DP2))
    run = replace(run, folder=tmp_path / "cut", stop_at=4)
    assert {e.error for e in train(run, DP2)} == {"Stopped"}
    assert curve(train(replace(run, stop_at=None, attempt=2), DP2)) == whole


def order_of_communication(rank: int, world: int, run: Run, layout: dict[str, int]) -> list[str]:
    """Begun and awaited collectives over the data axis, and the passes that they overlap with, in order."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Buckets

    from headrace_trainer.engine.device.megatron import parallel_state  # noqa: F401 - installs the adapter
    from headrace_trainer.engine.step import Stepper

    events: list[str] = []

    def note(event: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: events.append(event)

    with (
        noted(Stepper, "gradients", note("step")),
        noted(Stepper, "update", note("update")),
        noted(Buckets, "start_grad_sync", note("reduce")),
        noted(Buckets, "finish_grad_sync", note("await reduction")),
        noted(Buckets, "start_param_sync", note("gather")),
    ):
        train_rank(rank, world, run, layout)
    return events


def test_replicas_communicate_while_they_compute(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, steps=3, bucket_size=SMALL)
    for ended in gang(order_of_communication, 2, run, DP2):
        assert not ended.error, ended
        # Megatron learns in the first step when a bucket is full; the second one shows.
        first, second = (i for i, event in enumerate(ended.value) if event == "step" and i > 0)
        step = ended.value[first:second]
        num_buckets = step.count("reduce")
        assert num_buckets > 3
        gathers, reductions = ["gather"] * num_buckets, ["reduce"] * num_buckets
        assert step == ["step", *gathers, *reductions, *(["await reduction"] * num_buckets), "update"]


def waits_of_the_host(rank: int, world: int, run: Run, layout: dict[str, int]) -> int:
    """How often a number was taken from a tensor while gradients were computed."""
    import torch

    from headrace_trainer.engine.step import Stepper

    waits, inside = 0, False
    gradients = Stepper.gradients

    def watched(self: Stepper, batch: Any) -> Any:
        nonlocal inside
        inside = True
        try:
            return gradients(self, batch)
        finally:
            inside = False

    def note(tensor: torch.Tensor, *_args: Any) -> None:
        nonlocal waits
        # Megatron compares its generators' states, which are on the CPU on every machine.
        waits += inside and tensor.dtype is not torch.bool

    Stepper.gradients = watched  # type: ignore[method-assign]
    names = ("item", "tolist", "numpy", "__float__", "__int__", "__bool__")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(noted(torch.Tensor, name, note))
        train_rank(rank, world, run, layout)
    return waits


@pytest.mark.parametrize(("layout", "world"), [(TP1, 1), (TP2, 2), (PP2, 2)], ids=["TP1", "TP2", "PP2"])
def test_no_micro_batch_makes_the_host_wait(tmp_path: Path, layout: dict[str, int], world: int) -> None:
    def waits(micro_batch_size: int) -> list[int]:
        run = Run(folder=tmp_path / str(micro_batch_size), steps=3, overrides={"microBatchSize": micro_batch_size})
        ended = gang(waits_of_the_host, world, run, layout)
        assert not any(e.error for e in ended), ended
        return [e.value for e in ended]

    assert waits(1) == waits(4)


def groups_used(rank: int, world: int, run: Run, layout: dict[str, int]) -> tuple[int, int]:
    """Collectives over the control group after the first step has begun, and in all."""
    import torch.distributed as dist

    from headrace_trainer.engine.loop import Loop
    from headrace_trainer.engine.step import Stepper

    control, stepping, used, total = None, False, 0, 0

    def begin(stepper: Stepper, *_args: Any) -> None:
        nonlocal stepping, control
        stepping, control = True, stepper.gang.control

    def end(*_args: Any, **_kwargs: Any) -> None:
        nonlocal stepping
        stepping = False

    def note(*_args: Any, group: Any = None, **_kwargs: Any) -> None:
        nonlocal used, total
        if stepping:
            used, total = used + (group is control), total + 1

    with (
        noted(Stepper, "gradients", begin),
        noted(Loop, "_validate", end),
        noted(dist, "all_reduce", note),
        noted(dist, "all_gather_object", note),
        noted(dist, "barrier", note),
    ):
        train_rank(rank, world, run, layout)
    return used, total


def test_a_step_talks_over_the_training_backend_alone(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, steps=4, overrides={"validation": {"every": 4, "samples": 4}})
    for ended in gang(groups_used, 2, run, DP2):
        assert not ended.error, ended
        used, total = ended.value
        assert used == 0
        assert total >= 4


def collections(rank: int, world: int, run: Run) -> tuple[list[int], bool]:
    """Steps after which garbage was collected, -1 for one in a step, and whether the collector is on in the end."""
    from headrace_trainer.engine import garbage
    from headrace_trainer.engine.loop import Loop

    garbage._EVERY = 3  # type: ignore[attr-defined]
    gc.set_threshold(1, 1, 1)  # left to itself, at every object
    found: list[int] = []
    loop: Loop | None = None
    step, inside = Loop._train_step, False

    def watched(self: Loop) -> Any:
        nonlocal loop, inside
        loop, inside = self, True
        try:
            return step(self)
        finally:
            inside = False

    def note(phase: str, _info: Any) -> None:
        if phase == "start" and loop is not None and loop.step < run.steps:
            found.append(-1 if inside else loop.step)

    Loop._train_step = watched  # type: ignore[method-assign]
    gc.callbacks.append(note)
    train_rank(rank, world, run, TP1)
    return found, gc.isenabled()


def test_garbage_is_collected_between_steps_only(tmp_path: Path) -> None:
    (ended,) = gang(collections, 1, Run(folder=tmp_path, steps=8))
    assert ended.value == ([3, 6], True), ended
