"""Learning to score: the chosen side of a pair above the rejected one (arXiv 2203.02155, eq. 1).

A score is that of a document's last token. Shapes: 1 the row of a micro-batch, T its tokens, D its documents, N its pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from headrace_trainer.engine.device import send
from headrace_trainer.engine.losses import bradley_terry
from headrace_trainer.engine.objective import Loss
from headrace_trainer.engine.packed import PackedBatch
from headrace_trainer.engine.packs import PackedSamples
from headrace_trainer.formats.packs import Pack


@dataclass(frozen=True, kw_only=True)
class MarginBatch:
    """A row of pairs."""

    row: PackedBatch
    margin_N: torch.Tensor
    """By how much the chosen side is better, as far as the records say so."""
    weight: float
    """0 where the row only fills a round of micro-batches."""


class PairScores(PackedSamples):
    """The mean Bradley-Terry loss over pairs.

    Args:
        centering: weight of the squared sum of a pair's scores.
        fixed: as ``PackedSamples``.
    """

    METRICS = ("accuracy", "margin", "mean_reward")

    def __init__(self, *, centering: float, fixed: bool) -> None:
        super().__init__(fixed=fixed)
        self._centering = centering

    def collate(self, samples: list[Pack], weights: list[float], device: torch.device) -> MarginBatch:
        """Packs of pairs -> one row."""
        counted = [pack for pack, weight in zip(samples, weights, strict=True) if weight]
        margins = [d.margin or 0.0 for pack in counted or samples[:1] for d in pack.documents[::2]]
        return MarginBatch(
            row=self.row(samples, weights, device),
            margin_N=send(torch.tensor(margins), device),
            weight=float(bool(counted)),
        )

    def forward(
        self, model: torch.nn.Module, batch: MarginBatch
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
        """Losses of the row's pairs."""

        def loss(scores_1T1: torch.Tensor) -> Loss:
            return self._loss(batch, batch.row.lasts(scores_1T1.float()[..., 0]))

        return batch.row.run(model), loss

    def _loss(self, batch: MarginBatch, scores_D: torch.Tensor) -> Loss:
        chosen_N, rejected_N = scores_D[::2], scores_D[1::2]
        losses_N = bradley_terry(chosen_N, rejected_N, margin=batch.margin_N, centering=self._centering)
        figures = (chosen_N > rejected_N).float(), chosen_N - rejected_N, (chosen_N + rejected_N) / 2
        return Loss(
            total=losses_N.sum() * batch.weight,
            count=torch.tensor(int(losses_N.numel() * batch.weight), dtype=torch.int32, device=losses_N.device),
            metrics=tuple(figure.detach().sum() * batch.weight for figure in figures),
        )
