"""The optimizer against torch's AdamW, step by step, on gradients that are given to both."""

from typing import Any

import pytest

from trainer.engine.gangs import DP2, TP1, gang
from trainer.engine.test_model import SHAPE, built

RATES = [1e-2, 2e-2, 5e-3, 1e-3, 1e-2, 3e-2]
SCALES = [1e-3, 1e-1, 1e-4, 1.0, 1e-3, 10.0]
"""Of the gradients: their norms lie on both sides of the largest one allowed."""
CLIP = 2.0


def follow_adamw(rank: int, world: int, layout: dict[str, int], decay: float) -> list[tuple[float, float, float]]:
    """Largest difference of any weight, the norm that was returned, and torch's norm, after every step."""
    import torch

    from headrace_api.stages.training import Optimizer, Precision, Schedule
    from headrace_trainer.engine.objective import NextToken
    from headrace_trainer.engine.optimizer import build_optimizer, wrap_model
    from headrace_trainer.engine.step import Stepper

    with built(rank, layout, SHAPE) as (ranks, model):
        settings = Optimizer(beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=decay, clip_norm=CLIP)
        wrapped = wrap_model(model)
        optimizer = build_optimizer(wrapped, settings, schedule=Schedule(), precision=Precision.FP32)
        optimizer.reload_model_params()
        stepper = Stepper(
            gang=ranks,
            model=wrapped,
            optimizer=optimizer,
            objective=NextToken(),
            sequence_length=32,
            micro_batch_size=1,
            weight_decay=decay,
        )
        copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
        groups = [
            {"params": [p for p in copies if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in copies if p.dim() == 1], "weight_decay": 0.0},
        ]
        reference = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)
        random = torch.Generator().manual_seed(3)
        found = []
        for rate, scale in zip(RATES, SCALES, strict=True):
            for ours, theirs in zip(model.parameters(), copies, strict=True):
                theirs.grad = scale * torch.randn(theirs.shape, generator=random)
                ours.main_grad.copy_(theirs.grad)
            expected = torch.nn.utils.clip_grad_norm_(copies, CLIP)
            for group in reference.param_groups:
                group["lr"] = rate
            reference.step()
            norm = stepper.gradient_norm()
            stepper.update(learning_rate=rate, gradient_norm=norm)
            stepper.gather_weights()
            difference = max((a - b).abs().max().item() for a, b in zip(model.parameters(), copies, strict=True))
            found.append((difference, norm, expected.item()))
        return found


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("layout", "world"), [(TP1, 1), (DP2, 2)], ids=["TP1", "DP2"])
def test_every_step_is_that_of_adamw(layout: dict[str, int], world: int, decay: float) -> None:
    for ended in gang(follow_adamw, world, layout, decay):
        assert not ended.error, ended
        steps: list[Any] = ended.value
        assert [norm for _, norm, _ in steps] == pytest.approx([expected for *_, expected in steps], rel=1e-5)
        assert {expected > CLIP for *_, expected in steps} == {True, False}
        assert max(difference for difference, *_ in steps) < 1e-6
