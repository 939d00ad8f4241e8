"""One step: micro-batches -> gradients -> weights, by Megatron's schedules, with pipeline stages or without.

Nothing here waits for the GPU but ``gradient_norm``: clipping needs the number on the host.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headrace_trainer.engine.batches import GlobalBatch
from headrace_trainer.engine.device.megatron import (
    DistributedDataParallel,
    MegatronModule,
    MegatronOptimizer,
    get_forward_backward_func,
)
from headrace_trainer.engine.objective import Batch, Objective
from headrace_trainer.engine.optimizer import clip_gradient, set_rates
from headrace_trainer.engine.parallel import Gang


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """Runs micro-batches through the model. Every rank calls the same methods in the same order."""

    gang: Gang
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    objective: Objective
    sequence_length: int
    micro_batch_size: int
    weight_decay: float

    def gradients(self, batch: GlobalBatch) -> torch.Tensor:
        """Gradients of the mean loss over the global batch, reduced over the gang.

        Returns:
            What this rank adds to the gang's sums, float64 on its device: the loss, what it is over, and the
            objective's other figures.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batch, forward_only=False)

    def losses(self, batch: GlobalBatch) -> torch.Tensor:
        """The same sums alone; weights and gradients stay as they are."""
        return self._run(batch, forward_only=True)

    def means(self, sums: Sequence[float]) -> tuple[float, dict[str, float]]:
        """The gang's sums -> the mean loss, and the means of the objective's other figures by name."""
        total, count, *others = sums
        means = {name: value / count for name, value in zip(self.objective.METRICS, others, strict=True)}
        return total / count, self.objective.figures(means)

    def gradient_norm(self) -> float:
        """The norm of the whole gradient, before clipping; the same on every rank."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def update(self, *, learning_rate: float, gradient_norm: float) -> None:
        """Clip the gradient, then step the optimizer. Where it is not called, the step leaves no trace."""
        clip_gradient(self.optimizer, norm=gradient_norm)
        set_rates(self.optimizer, learning_rate=learning_rate, weight_decay=self.weight_decay)
        self.optimizer.step_with_ready_grads()

    def gather_weights(self) -> None:
        """Make the weights whole on every rank now: those of the last update are gathered by the next forward pass."""
        if self.model.ddp_config.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)

    def _run(self, batch: GlobalBatch, *, forward_only: bool) -> torch.Tensor:
        sums = torch.zeros(2 + len(self.objective.METRICS), dtype=torch.float64, device=self.gang.device)

        def forward(micro_batches: Iterator[Batch], model: MegatronModule) -> tuple[Any, Callable[..., Any]]:
            output, loss_of = self.objective.forward(model, next(micro_batches))

            def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
                found = loss_of(output)
                if self.gang.counts_loss:
                    figures = (found.total, found.count, *found.metrics)
                    sums.add_(torch.stack([figure.detach().double() for figure in figures]))
                return found.total, found.count, None

            return output, loss

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=batch.micro_batches,
            model=[self.model],
            num_microbatches=batch.num_micro_batches,
            seq_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
        )
        return sums
