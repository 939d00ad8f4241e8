"""What is minimized: a batch through a model -> a sum of losses and what it is over: tokens, or pairs.

The loop knows nothing of what a batch holds; an ``Objective`` does.

Shapes: B micro-batch, T sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from headrace_trainer.engine.device import send


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, the same on the tensor and pipeline ranks of a replica."""

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    mask_BT: torch.Tensor
    """1 where a label counts, else 0."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Losses of one micro-batch, added up."""

    total: torch.Tensor
    """Sum over the tokens, or the pairs, that count, in nats; gradients start here."""
    count: torch.Tensor
    """Number of them, int32."""
    metrics: tuple[torch.Tensor, ...] = ()
    """Sums over the same of the objective's ``METRICS``."""


class Objective(Protocol):
    """One thing to train for."""

    METRICS: ClassVar[tuple[str, ...]]
    """What is measured besides the loss, each as a mean over what counts."""

    def shape(self, micro_batch_size: int, sequence_length: int) -> tuple[int, int]:
        """Rows, and tokens of a row, that samples of this length become in one forward pass."""

    def collate(self, samples: list[Any], weights: list[float], device: torch.device) -> Any:
        """Samples of one micro-batch -> tensors on ``device``; a sample of weight 0 does not count."""

    def forward(self, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
        """Run this stage of the model; on the last stage its output goes through the function that comes second."""

    def figures(self, means: dict[str, float]) -> dict[str, float]:
        """What is recorded, from the means of ``METRICS`` over what counts."""


class NextToken:
    """Predict each token from those before it: the mean negative log-likelihood over all tokens."""

    METRICS = ()

    def shape(self, micro_batch_size: int, sequence_length: int) -> tuple[int, int]:
        """A row for each sample."""
        return micro_batch_size, sequence_length

    def collate(self, samples: list[np.ndarray], weights: list[float], device: torch.device) -> Batch:
        """Shift samples of T + 1 tokens into T inputs and T labels."""
        sequences = send(torch.from_numpy(np.stack(samples)), device)
        labels = sequences[:, 1:].contiguous()
        mask = send(torch.tensor(weights), device)[:, None].expand(labels.shape)
        return Batch(tokens_BT=sequences[:, :-1].contiguous(), labels_BT=labels, mask_BT=mask)

    def forward(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
        """Token losses of the batch. Attention is causal without a mask; rotary positions need no ids."""
        positions = torch.arange(batch.tokens_BT.size(1), device=batch.tokens_BT.device).expand_as(batch.tokens_BT)
        losses_BT = model(batch.tokens_BT, positions, None, labels=batch.labels_BT)
        return losses_BT, lambda output_BT: _over_tokens(output_BT, batch.mask_BT)

    def figures(self, means: dict[str, float]) -> dict[str, float]:
        """As they are."""
        return means


def _over_tokens(losses_BT: torch.Tensor, mask_BT: torch.Tensor) -> Loss:
    return Loss(total=(losses_BT.float() * mask_BT).sum(), count=mask_BT.sum().to(torch.int32))
