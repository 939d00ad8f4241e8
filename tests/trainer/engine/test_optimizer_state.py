"""The optimizer's state as boxes: exact for any run of any tensor, and written where it is."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np

from trainer.engine.gangs import DP2, Run, gang, joined


def test_boxes_hold_exactly_the_elements_of_a_run() -> None:
    from headrace_trainer.engine.checkpoint.optimizer_state import boxes

    seed = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(10**9)))
    print(f"HEADRACE_TEST_SEED={seed}")
    draw = random.Random(seed)
    for _ in range(2000):
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 4)))
        elements = np.arange(np.prod(shape)).reshape(shape)
        start, stop = sorted(draw.randint(0, elements.size) for _ in range(2))
        found = boxes(shape, start, stop)
        assert len(found) <= 2 * len(shape) - 1
        inside = [elements[tuple(slice(o, o + s) for o, s in zip(b.offsets, b.sizes, strict=True))] for b in found]
        assert [int(e) for box in inside for e in box.ravel()] == list(range(start, stop)), (shape, start, stop)


def save_without_gathers(rank: int, world: int, run: Run, layout: dict[str, int]) -> list[int]:
    """Save where no tensor may be gathered; the size of each rank's file."""
    import torch.distributed as dist

    from headrace_trainer.engine.checkpoint.state import StateWriter

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("state was sent to another rank")

    def saved(loop: Any, _ctx: Any, _card: Any) -> list[int]:
        for name in ("all_gather", "all_gather_into_tensor", "gather"):
            setattr(dist, name, refuse)
        (run.folder / "saved").mkdir(exist_ok=True)
        write = StateWriter(loop.state).begin(run.folder / "saved")
        write.write()
        dist.barrier()
        return [p.stat().st_size for p in sorted((run.folder / "saved").glob("*.distcp"))]

    return joined(rank, world, run, layout, saved)


def test_replicas_write_their_own_parts_and_send_nothing(tmp_path: Path) -> None:
    ended = gang(save_without_gathers, 2, Run(folder=tmp_path), DP2)
    assert [e.error for e in ended] == ["", ""], ended
    first, second = ended[0].value
    assert 0.9 < first / second < 1.1
