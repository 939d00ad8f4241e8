"""Learning from pairs: a policy is drawn towards the chosen side and away from the rejected one (arXiv 2305.18290).

A unit of a pack is a pair: its chosen side, then its rejected one. Shapes: 1 the row of a micro-batch, T its tokens,
D its documents, N its pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from headrace_trainer.engine.device import send
from headrace_trainer.engine.logprobs import score
from headrace_trainer.engine.losses import Preference, preference
from headrace_trainer.engine.objective import Loss
from headrace_trainer.engine.packed import PackedBatch
from headrace_trainer.engine.packs import PackedSamples
from headrace_trainer.formats.packs import Pack


@dataclass(frozen=True, kw_only=True)
class ReferencedPack:
    """A pack of pairs, and what the reference model says of its documents."""

    pack: Pack
    reference: np.ndarray
    """float32 [D]: log-probability of each document's labels, summed, in nats."""


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """A row of pairs."""

    row: PackedBatch
    reference_D: torch.Tensor
    weight: float
    """0 where the row only fills a round of micro-batches."""


class PairPreference(PackedSamples):
    """The mean loss over pairs.

    Args:
        kind: how a preference becomes a loss.
        beta: how strongly the policy is held to the reference.
        label_smoothing: the probability that a label is wrong.
        by_length: whether log-probabilities are means over a completion's tokens.
        fixed: as ``PackedSamples``.
    """

    METRICS = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    )

    def __init__(self, *, kind: Preference, beta: float, label_smoothing: float, by_length: bool, fixed: bool) -> None:
        super().__init__(fixed=fixed)
        self._kind, self._beta, self._label_smoothing, self._by_length = kind, beta, label_smoothing, by_length

    def collate(self, samples: list[ReferencedPack], weights: list[float], device: torch.device) -> PairBatch:
        """Packs of pairs -> one row."""
        counted = [s for s, weight in zip(samples, weights, strict=True) if weight]
        reference = np.concatenate([s.reference for s in counted or samples[:1]])
        return PairBatch(
            row=self.row([s.pack for s in samples], weights, device),
            reference_D=send(torch.from_numpy(reference), device),
            weight=float(bool(counted)),
        )

    def forward(self, model: torch.nn.Module, batch: PairBatch) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
        """Losses of the row's pairs."""
        output, scores = score(model, batch.row)

        def loss(output: torch.Tensor) -> Loss:
            log_probs_D = batch.row.sums(scores(output).log_probs_1T.float() * batch.row.mask_1T)
            return self._loss(batch, log_probs_D)

        return output, loss

    def _loss(self, batch: PairBatch, log_probs_D: torch.Tensor) -> Loss:
        ratios_D = log_probs_D - batch.reference_D
        if self._by_length:
            ratios_D = ratios_D / batch.row.sums(batch.row.mask_1T)
        delta_N = ratios_D[::2] - ratios_D[1::2]
        losses_N = preference(delta_N, kind=self._kind, beta=self._beta, label_smoothing=self._label_smoothing)
        rewards_D = self._beta * ratios_D.detach()
        chosen_N, rejected_N = rewards_D[::2], rewards_D[1::2]
        figures = (
            chosen_N,
            rejected_N,
            (chosen_N > rejected_N).float(),
            chosen_N - rejected_N,
            log_probs_D.detach()[::2],
            log_probs_D.detach()[1::2],
        )
        return Loss(
            total=losses_N.sum() * batch.weight,
            count=torch.tensor(int(delta_N.numel() * batch.weight), dtype=torch.int32, device=delta_N.device),
            metrics=tuple(figure.sum() * batch.weight for figure in figures),
        )
