"""What a save costs the rank that makes it: one copy into memory that is there, and nothing for its forks."""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headrace_trainer.engine.checkpoint.background import Background
from headrace_trainer.engine.checkpoint.staging import Staging
from trainer.engine.gangs import TP1, Run, gang, joined

PAGES = 2048


def page_faults(act: Callable[[], Any]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    act()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_what_is_left_out_of_a_fork_is_not_paid_for_page_by_page(tmp_path: Path) -> None:
    state = torch.ones(PAGES * resource.getpagesize() // 4)
    end = tmp_path / "end"

    def wait() -> str:
        while not end.exists():
            time.sleep(0.01)
        return "done"

    work: Background[str] = Background(wait, without=[state])
    assert page_faults(lambda: state.add_(1)) < PAGES // 4
    end.touch()
    assert work.result() == "done"
    assert state.eq(2).all()


def test_a_fork_has_the_copy_while_the_state_goes_on(tmp_path: Path) -> None:
    staging, state, begin = Staging(), torch.ones(PAGES * resource.getpagesize() // 4), tmp_path / "begin"
    (held,) = staging.hold([state])

    def total() -> float:
        while not begin.exists():
            time.sleep(0.01)
        return float(held.sum())

    work: Background[float] = Background(total, without=[state])
    state.zero_()
    begin.touch()
    assert work.result() == state.numel()


def test_copies_are_exact_whatever_is_copied_and_the_memory_stays() -> None:
    staging = Staging()
    buffer = torch.arange(1000, dtype=torch.float32)
    tensors = [
        buffer[3:10],
        torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(),
        torch.tensor(5),
        torch.empty(0, 4),
        torch.tensor([True, False]),
    ]
    first = staging.hold(tensors)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, tensors, strict=True))
    assert first[0].untyped_storage().nbytes() == tensors[0].nbytes, "a part is written without the rest of its buffer"
    buffer.zero_()
    assert first[0].tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert staging.hold(tensors)[0].data_ptr() == first[0].data_ptr()


def bytes_of_new_copies(rank: int, world: int, run: Run) -> int:
    """What is copied into new memory while a save begins, after the first."""
    from headrace_trainer.engine.checkpoint.state import StateWriter

    def begun(loop: Any, _ctx: Any, _card: Any) -> int:
        writer, copied, clone = StateWriter(loop.state), [], torch.Tensor.clone

        def noted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            copied.append(tensor.nbytes)
            return clone(tensor, *args, **kwargs)

        for name in ("one", "two"):
            (run.folder / name).mkdir()
            torch.Tensor.clone = noted  # type: ignore[method-assign]
            copied.clear()
            writer.begin(run.folder / name)
            torch.Tensor.clone = clone  # type: ignore[method-assign]
        return sum(copied)

    return int(joined(rank, world, run, TP1, begun))


def test_a_save_copies_nothing_into_new_memory(tmp_path: Path) -> None:
    ended = gang(bytes_of_new_copies, 1, Run(folder=tmp_path))
    assert ended[0].error == "", ended
    assert ended[0].value < 1000
