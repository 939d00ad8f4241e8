"""Which samples, which rate, how fast: the pure parts of the loop."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from headrace_api.stages.training import Schedule
from headrace_trainer.engine.batches import Batches, positions
from headrace_trainer.engine.history import History
from headrace_trainer.engine.objective import NextToken
from headrace_trainer.engine.pace import Pace
from headrace_trainer.engine.schedule import is_due, learning_rate


@pytest.mark.parametrize("data_ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_replicas_share_a_global_batch_without_rest(data_ranks: int, micro_batch_size: int) -> None:
    read = [
        p
        for rank in range(data_ranks)
        for batch in positions(size=8, micro_batch_size=micro_batch_size, data_rank=rank, data_ranks=data_ranks)
        for p in batch
    ]
    assert sorted(read) == list(range(8))


def test_a_rest_is_filled_up_to_whole_rounds() -> None:
    assert positions(size=5, micro_batch_size=2, data_rank=1, data_ranks=2) == [[2, 3], [6, 7]]


def test_samples_are_read_when_their_micro_batch_is_due() -> None:
    read: list[int] = []

    class Noted:
        num_samples = 100

        def sample(self, index: int) -> np.ndarray:
            read.append(index)
            return np.arange(9)

    place: Any = SimpleNamespace(data_rank=1, layout=SimpleNamespace(data=2), device=torch.device("cpu"))
    batches = Batches(samples=Noted(), objective=NextToken(), gang=place, micro_batch_size=2)
    batch = batches.read(40, 7)
    assert (batch.num_micro_batches, read) == (2, [])
    assert next(batch.micro_batches).mask_BT[:, 0].tolist() == [1.0, 1.0]
    assert read == [42, 43]
    assert next(batch.micro_batches).mask_BT[:, 0].tolist() == [1.0, 0.0]
    assert read == [42, 43, 46, 46]


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (1, 0.25),
        (2, 0.5),
        (4, 1.0),
        (5, 0.1 + 0.9 * (1 + math.cos(math.pi * 1 / 10)) / 2),
        (9, 0.55),
        (13, 0.1 + 0.9 * (1 + math.cos(math.pi * 9 / 10)) / 2),
        (14, 0.1),
    ],
    ids=["first", "half way up", "peak", "after the peak", "half way down", "last but one", "last"],
)
def test_the_rate_rises_by_a_line_then_falls_by_a_cosine(step: int, rate: float) -> None:
    schedule = Schedule(learning_rate=1.0, warmup=4, min_learning_rate=0.1)
    assert learning_rate(schedule, step=step, steps=14) == pytest.approx(rate, abs=1e-12)


def test_without_a_warm_up_the_cosine_begins_at_once() -> None:
    schedule = Schedule(learning_rate=2e-3)
    rates = [learning_rate(schedule, step=step, steps=4) for step in range(1, 5)]
    assert rates == pytest.approx([1.7363961e-3, 1.1e-3, 4.636039e-4, 2e-4], rel=1e-6)


def test_a_constant_rate_stays_at_its_peak() -> None:
    schedule = Schedule.model_validate({"learningRate": 2e-3, "decay": "constant"})
    assert {learning_rate(schedule, step=step, steps=9) for step in range(1, 10)} == {2e-3}


@pytest.mark.parametrize(
    ("every", "step", "seconds", "due"),
    [(10, 20, 0.0, True), (10, 21, 1e9, False), ("30m", 1, 1800.0, True), ("30m", 1000, 1799.0, False)],
)
def test_a_save_is_due_by_steps_or_by_time(every: int | str, step: int, seconds: float, due: bool) -> None:
    assert is_due(every, step=step, seconds=seconds) is due


def test_pace_counts_training_and_leaves_out_the_rest() -> None:
    times = iter([0.0, 2.0, 4.0, 100.0, 102.0])
    pace = Pace(1000, clock=lambda: next(times))
    assert pace.tokens_per_second is None
    pace.step()
    pace.step()
    pace.restart()
    pace.step()
    assert pace.tokens_per_second == 500.0
    assert pace.seconds_for(10) == 20.0


def test_a_history_comes_back_as_it_was() -> None:
    history = History()
    history.add(step=1, loss=0.1 + 0.2, grad_norm=1.5, learning_rate=3e-4, tokens=256)
    history.add_validation(2.5)
    history.add(step=2, loss=1 / 3, grad_norm=1.25, learning_rate=3e-4, tokens=512)
    again = History.loads(history.dumps())
    assert again == history
    assert float.fromhex(again.records[0]["loss_hex"]) == 0.1 + 0.2
    assert again.validation_loss == 2.5
