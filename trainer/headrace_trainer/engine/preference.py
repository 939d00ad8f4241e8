"""Learning from pairs: a policy is drawn towards the chosen side and away from the rejected one (arXiv 2305.18290).

A unit of a pack is a pair: its chosen side, then its rejected one. Next: ``engine.unpaired`` learns from single answers.
Shapes: 1 the row of a micro-batch, T its tokens, D its documents, N its pairs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from headrace_trainer.engine.device import send
from headrace_trainer.engine.logprobs import score
from headrace_trainer.engine.losses import Preference, log_odds, odds_ratio, preference, simpo
from headrace_trainer.engine.objective import Loss
from headrace_trainer.engine.packed import PackedBatch
from headrace_trainer.engine.packs import PackedSamples
from headrace_trainer.formats.packs import Pack


@dataclass(frozen=True, kw_only=True)
class ReferencedPack:
    """A pack, and what the reference model says of its documents."""

    pack: Pack
    reference: np.ndarray
    """float32 [D]: log-probability of each document's labels, summed, in nats."""


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """A row of pairs."""

    row: PackedBatch
    reference_D: torch.Tensor | None
    """Log-probabilities under the reference model, where there is one."""
    weight: float
    """0 where the row only fills a round of micro-batches."""


class _Pairs(PackedSamples, ABC):
    """What losses of pairs have in common: one forward pass of a row, and the implicit rewards."""

    METRICS: ClassVar[tuple[str, ...]] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    )

    def forward(self, model: torch.nn.Module, batch: PairBatch) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
        """Losses of the row's pairs."""
        output, scores = score(model, batch.row)

        def loss(output: torch.Tensor) -> Loss:
            log_probs_D = batch.row.sums(scores(output).log_probs_1T.float() * batch.row.mask_1T)
            return self._loss(batch, log_probs_D)

        return output, loss

    @abstractmethod
    def _loss(self, batch: PairBatch, log_probs_D: torch.Tensor) -> Loss:
        """Of the row, from the log-probability of each document's labels."""

    def _summed(
        self,
        batch: PairBatch,
        losses_N: torch.Tensor,
        *,
        rewards_D: torch.Tensor,
        log_probs_D: torch.Tensor,
        others: tuple[torch.Tensor, ...] = (),
    ) -> Loss:
        """Sums over the pairs, those of the figures too; ``others`` [N] come after the ones that all have."""
        chosen_N, rejected_N = rewards_D[::2], rewards_D[1::2]
        figures = (
            chosen_N,
            rejected_N,
            (chosen_N > rejected_N).float(),
            chosen_N - rejected_N,
            log_probs_D[::2],
            log_probs_D[1::2],
            *others,
        )
        return Loss(
            total=losses_N.sum() * batch.weight,
            count=torch.tensor(int(losses_N.numel() * batch.weight), dtype=torch.int32, device=losses_N.device),
            metrics=tuple(figure.detach().sum() * batch.weight for figure in figures),
        )


class PairPreference(_Pairs):
    """The mean loss over pairs, held to a reference model.

    Args:
        kind: how a preference becomes a loss.
        beta: how strongly the policy is held to the reference.
        label_smoothing: the probability that a label is wrong.
        by_length: whether log-probabilities are means over a completion's tokens.
        fixed: as ``PackedSamples``.
    """

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

    def _loss(self, batch: PairBatch, log_probs_D: torch.Tensor) -> Loss:
        assert batch.reference_D is not None
        ratios_D = log_probs_D - batch.reference_D
        if self._by_length:
            ratios_D = ratios_D / _lengths(batch.row)
        delta_N = ratios_D[::2] - ratios_D[1::2]
        losses_N = preference(delta_N, kind=self._kind, beta=self._beta, label_smoothing=self._label_smoothing)
        return self._summed(batch, losses_N, rewards_D=self._beta * ratios_D, log_probs_D=log_probs_D)


class _FreePairs(_Pairs):
    """Pairs without a reference model; log-probabilities are means over a completion's tokens.

    Args:
        beta: what multiplies a mean log-probability in the implicit reward.
        fixed: as ``PackedSamples``.
    """

    def __init__(self, *, beta: float, fixed: bool) -> None:
        super().__init__(fixed=fixed)
        self._beta = beta

    def collate(self, samples: list[Pack], weights: list[float], device: torch.device) -> PairBatch:
        """Packs of pairs -> one row."""
        return PairBatch(row=self.row(samples, weights, device), reference_D=None, weight=float(any(weights)))

    def _loss(self, batch: PairBatch, log_probs_D: torch.Tensor) -> Loss:
        means_D = log_probs_D / _lengths(batch.row)
        losses_N, others = self._losses(means_D[::2], means_D[1::2])
        return self._summed(batch, losses_N, rewards_D=self._beta * means_D, log_probs_D=means_D, others=others)

    @abstractmethod
    def _losses(
        self, chosen_N: torch.Tensor, rejected_N: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The pairs' losses, and their other figures."""


class MarginPreference(_FreePairs):
    """SimPO: the chosen side must win by a margin (arXiv 2405.14734).

    Args:
        beta: scale of mean log-probabilities.
        gamma: the margin.
        fixed: as ``PackedSamples``.
    """

    def __init__(self, *, beta: float, gamma: float, fixed: bool) -> None:
        super().__init__(beta=beta, fixed=fixed)
        self._gamma = gamma

    def _losses(
        self, chosen_N: torch.Tensor, rejected_N: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        return simpo(chosen_N, rejected_N, beta=self._beta, gamma=self._gamma), ()


class OddsRatioPreference(_FreePairs):
    """ORPO: the likelihood of the chosen side, and beta times its odds against the rejected one (arXiv 2403.07691, eq. 6)."""

    METRICS = (*_FreePairs.METRICS, "nll_loss", "log_odds_ratio", "log_odds_chosen")

    def _losses(
        self, chosen_N: torch.Tensor, rejected_N: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        against_N = odds_ratio(chosen_N, rejected_N)
        odds_N = log_odds(chosen_N) - log_odds(rejected_N)
        return -chosen_N + self._beta * against_N, (-chosen_N, -against_N, odds_N)


def _lengths(row: PackedBatch) -> torch.Tensor:
    """Labels of each document, [D]; 1 where the row only fills a round, whose 0 / 0 would be NaN even with a weight of 0."""
    return row.sums(row.mask_1T).clamp(min=1)
