"""The same losses under every layout, and the same as plain torch: layouts and padding change nothing but speed."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.engine.gangs import BATCH, DP2, LENGTH, PP2, TP1, TP2, TP2_PP2, Run, Synthetic, losses, train
from trainer.engine.test_model import SHAPE, start_weights, transformers_llama

ODD = LENGTH + 1
"""A length that two tensor ranks cannot split: no sequence parallelism."""
SLOW = pytest.mark.slow
OPTIMIZER = {"weightDecay": 0.5, "clipNorm": 2.5}


def run_in(folder: Path, *, tied: bool = False, length: int = LENGTH, **fields: Any) -> Run:
    return Run(folder=folder, steps=12, length=length, model={"tieEmbeddings": tied}, **fields)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    found: dict[Any, list[float]] = {}

    def of(*, tied: bool, length: int) -> list[float]:
        if (tied, length) not in found:
            run = run_in(tmp_path_factory.mktemp("one"), tied=tied, length=length)
            found[tied, length] = losses(run, TP1)
        return found[tied, length]

    return of


def test_one_rank_learns(one_rank: Callable[..., list[float]]) -> None:
    curve = one_rank(tied=False, length=LENGTH)
    assert len(curve) == 12
    assert curve[-1] < curve[0] - 0.2


@pytest.mark.parametrize(
    ("layout", "tied", "length"),
    [
        pytest.param(TP2, False, ODD, id="TP2"),
        pytest.param(TP2, False, LENGTH, id="TP2+SP"),
        pytest.param(PP2, False, LENGTH, id="PP2"),
        pytest.param(DP2, False, LENGTH, id="DP2"),
        pytest.param(TP2_PP2, False, ODD, id="TP2xPP2", marks=SLOW),
        pytest.param(TP2_PP2, False, LENGTH, id="TP2xPP2+SP", marks=SLOW),
        pytest.param(TP2, True, ODD, id="tied-TP2"),
        pytest.param(TP2, True, LENGTH, id="tied-TP2+SP"),
        pytest.param(PP2, True, LENGTH, id="tied-PP2"),
        pytest.param(DP2, True, LENGTH, id="tied-DP2"),
        pytest.param(TP2_PP2, True, ODD, id="tied-TP2xPP2", marks=SLOW),
        pytest.param(TP2_PP2, True, LENGTH, id="tied-TP2xPP2+SP", marks=SLOW),
    ],
)
def test_every_layout_gives_the_losses_of_one_rank(
    tmp_path: Path, one_rank: Callable[..., list[float]], layout: dict[str, int], tied: bool, length: int
) -> None:
    found = losses(run_in(tmp_path, tied=tied, length=length), layout)
    assert found == pytest.approx(one_rank(tied=tied, length=length), abs=1e-5, rel=0)


@pytest.mark.parametrize(
    ("before", "after", "length"),
    [
        pytest.param(PP2, TP2, LENGTH, id="PP2 to TP2+SP"),
        pytest.param(TP2, PP2, LENGTH, id="TP2+SP to PP2"),
        pytest.param(TP2, TP1, ODD, id="TP2 to TP1"),
        pytest.param(TP2_PP2, DP2, LENGTH, id="TP2xPP2+SP to DP2", marks=SLOW),
    ],
)
def test_a_tied_model_goes_on_in_another_layout(
    tmp_path: Path,
    one_rank: Callable[..., list[float]],
    before: dict[str, int],
    after: dict[str, int],
    length: int,
) -> None:
    run = run_in(tmp_path, tied=True, length=length, stop_at=5)
    assert {e.error for e in train(run, before)} == {"Stopped"}
    moved = losses(replace(run, stop_at=None, attempt=2), after)
    assert moved == pytest.approx(one_rank(tied=True, length=length), abs=1e-5, rel=0)


def test_training_follows_plain_torch_step_by_step(tmp_path: Path) -> None:
    run = Run(folder=tmp_path / "run", steps=10, learning_rate=1e-2, overrides={"optimizer": OPTIMIZER})
    ended = train(run, TP1)
    assert ended[0].error == "", ended
    history = ended[0].value.history
    expected = list(plain_torch(run, start_weights(tmp_path / "start", TP1, SHAPE, seed=run.seed)))
    assert [r["loss"] for r in history] == pytest.approx([loss for loss, _ in expected], abs=1e-5, rel=0)
    assert [r["grad_norm"] for r in history] == pytest.approx([norm for _, norm in expected], rel=1e-4)
    assert {norm > OPTIMIZER["clipNorm"] for _, norm in expected} == {True, False}, "all steps are clipped, or none"


def plain_torch(run: Run, weights: dict[str, Any]) -> Any:
    """Loss and gradient norm of every step of transformers' Llama under torch's AdamW; no line of the trainer's."""
    import numpy as np
    import torch

    model = transformers_llama(weights, SHAPE)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": OPTIMIZER["weightDecay"]}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    source = Synthetic(run)
    for step in range(1, run.steps + 1):
        first = (step - 1) * BATCH
        samples = torch.from_numpy(np.stack([source.sample(i) for i in range(first, first + BATCH)]))
        logits = model(samples[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clipNorm"])
        # Two steps of warm-up, then a cosine to a tenth of the peak at the last step.
        curve = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / (run.steps - 2))) / 2
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * (step / 2 if step <= 2 else curve)
        optimizer.step()
        yield loss.item(), norm.item()
