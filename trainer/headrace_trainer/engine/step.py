"""One step: micro-batches -> gradients -> weights, by Megatron's schedules, with pipeline stages or without."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from headrace_trainer.engine.device.megatron import (
    DistributedDataParallel,
    MegatronModule,
    MegatronOptimizer,
    get_forward_backward_func,
)
from headrace_trainer.engine.objective import Batch, Loss, Objective
from headrace_trainer.engine.optimizer import set_rates
from headrace_trainer.engine.parallel import Gang


@dataclass(frozen=True, kw_only=True)
class Share:
    """What this rank's micro-batches add to the gang's loss; zeros on ranks that do not count."""

    loss: float
    """Sum of token losses, in nats."""
    num_tokens: float


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """Runs micro-batches through the model."""

    gang: Gang
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    objective: Objective
    sequence_length: int
    micro_batch_size: int
    weight_decay: float

    def gradients(self, batches: list[Batch]) -> Share:
        """Gradients of the mean token loss over the global batch, reduced over the gang."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batches, forward_only=False)

    def losses(self, batches: list[Batch]) -> Share:
        """Losses alone; weights and gradients stay as they are."""
        return self._run(batches, forward_only=True)

    def update(self, learning_rate: float) -> float:
        """Clip, then step the optimizer.

        Returns:
            The norm of the whole gradient before clipping.
        """
        set_rates(self.optimizer, learning_rate=learning_rate, weight_decay=self.weight_decay)
        _, grad_norm, _ = self.optimizer.step()
        return float(grad_norm)

    def _run(self, batches: list[Batch], *, forward_only: bool) -> Share:
        return run_batches(
            self.model,
            batches,
            gang=self.gang,
            objective=self.objective,
            sequence_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
        )


def run_batches(
    model: MegatronModule,
    batches: list[Batch],
    *,
    gang: Gang,
    objective: Objective,
    sequence_length: int,
    micro_batch_size: int,
    forward_only: bool = True,
) -> Share:
    """Take micro-batches through all pipeline stages. Every rank calls with the same number of them.

    Args:
        model: this rank's part; wrapped for training unless ``forward_only``.
        batches: this replica's micro-batches.
        gang: this rank's place.
        objective: what a batch means.
        sequence_length: tokens in a sample.
        micro_batch_size: samples in a micro-batch.
        forward_only: whether gradients are left out.
    """

    def forward(batches: Iterator[Batch], model: MegatronModule) -> tuple[Any, Callable[..., Any]]:
        output, loss_of = objective.forward(model, next(batches))
        return output, lambda output: _with_copy(loss_of(output))

    shares: list[tuple[torch.Tensor, torch.Tensor]] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    if not gang.counts_loss:
        return Share(loss=0.0, num_tokens=0.0)
    return Share(loss=sum(float(loss) for loss, _ in shares), num_tokens=sum(float(n) for _, n in shares))


def _with_copy(loss: Loss) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """What the schedule wants; it scales the loss that it is given in place, so the one that is reported is a copy."""
    return loss.total, loss.num_tokens, (loss.total.detach().clone(), loss.num_tokens)
