"""Learning from rewarded answers: a policy is drawn towards what was better than expected (arXiv 1707.06347, 2402.03300).

In: answers with advantages, and what the policy that drew them said of each token. Shapes: 1 the row of a micro-batch,
T its tokens, D its documents, M the tokens of one answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import torch

from headrace_trainer.engine.device import send
from headrace_trainer.engine.logprobs import TokenScores, score
from headrace_trainer.engine.losses import (
    Aggregation,
    KlEstimator,
    Surrogate,
    clipped_surrogate,
    kl_estimates,
    token_weights,
    value_losses,
)
from headrace_trainer.engine.objective import Loss
from headrace_trainer.engine.packed import PackedBatch
from headrace_trainer.engine.packs import PackedSamples
from headrace_trainer.formats.packs import Document, Pack


@dataclass(frozen=True, kw_only=True, eq=False)
class Experience:
    """An answer, and what is learned from it; arrays are float32 [M]."""

    document: Document
    """The prompt and the answer, of which only the answer is trained on."""
    log_probs: np.ndarray
    """Of the policy that drew it, in nats."""
    advantages: np.ndarray
    reference: np.ndarray | None = None
    """Log-probabilities under the model that the policy is held to."""
    values: np.ndarray | None = None
    """What the value was when the answer was drawn."""
    returns: np.ndarray | None = None
    """What the value should have been."""
    kl_weight: float = 0.0
    """Weight of the divergence from the reference in the loss."""


@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """A row of answers; what is not of an answer's token is 0."""

    row: PackedBatch
    log_probs_1T: torch.Tensor
    advantages_1T: torch.Tensor
    reference_1T: torch.Tensor | None
    values_1T: torch.Tensor | None
    returns_1T: torch.Tensor | None
    kl_weight: float


class Ratio(Enum):
    """What the probability ratio is of."""

    TOKEN = auto()
    """Each token."""
    MEAN = auto()
    """A whole answer, as the geometric mean over its tokens: GSPO."""
    SUM = auto()
    """A whole answer: RLOO."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How much a token of an answer may move the policy."""

    ratio: Ratio
    aggregation: Aggregation
    clip_low: float
    clip_high: float
    estimator: KlEstimator
    temperature: float
    """That answers were drawn with."""
    longest: int
    """Tokens that an answer may have."""


class PolicyGradient(PackedSamples):
    """The clipped surrogate of a policy, and its divergence from a reference.

    Args:
        rule: how tokens are weighed and clipped.
        fixed: as ``PackedSamples``.
    """

    METRICS: Sequence[str] = ("kl", "entropy", "policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio")

    def __init__(self, rule: Rule, *, fixed: bool) -> None:
        super().__init__(fixed=fixed)
        self._rule = rule

    def collate(self, samples: list[Experience], weights: list[float], device: torch.device) -> PolicyBatch:
        """Answers -> one row."""
        row = self.row([Pack(documents=(s.document,)) for s in samples], weights, device)
        counted = [s for s, weight in zip(samples, weights, strict=True) if weight]

        def laid_out(name: str) -> torch.Tensor | None:
            parts = [getattr(s, name) for s in counted]
            if any(part is None for part in parts):
                return None
            values = np.zeros(row.tokens_1T.shape, np.float32)
            if parts:
                values[_answers(row)] = np.concatenate(parts)
            return send(torch.from_numpy(values), device)

        log_probs, advantages = laid_out("log_probs"), laid_out("advantages")
        assert log_probs is not None and advantages is not None
        return PolicyBatch(
            row=row,
            log_probs_1T=log_probs,
            advantages_1T=advantages,
            reference_1T=laid_out("reference"),
            values_1T=laid_out("values"),
            returns_1T=laid_out("returns"),
            kl_weight=samples[0].kl_weight,
        )

    def forward(
        self, model: torch.nn.Module, batch: PolicyBatch
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
        """Losses of the row's answers."""
        output, scores = score(model, batch.row, temperature=self._rule.temperature, entropy=True)
        return output, lambda output: self._loss(batch, scores(output))

    def _loss(self, batch: PolicyBatch, scores: TokenScores) -> Loss:
        row, rule, entropy_1T = batch.row, self._rule, scores.entropy_1T
        assert entropy_1T is not None
        mask_1T = row.mask_1T
        log_probs_1T = scores.log_probs_1T.float()
        weights_T, count = self._weights(row, rule.aggregation)
        # Where a token weighs 1 / longest, figures are still means over tokens.
        shown_T = (
            weights_T if rule.aggregation is not Aggregation.CONSTANT else self._weights(row, Aggregation.SEQUENCE)[0]
        )
        surrogate, weights = self._surrogate(batch, log_probs_1T, weights_T)
        total = (surrogate.losses * weights).sum()
        kl_1T = torch.full_like(log_probs_1T, torch.nan)
        if batch.reference_1T is not None:
            kl_1T = kl_estimates(log_probs_1T * mask_1T, batch.reference_1T, kind=rule.estimator)
            if batch.kl_weight:
                total = total + batch.kl_weight * (kl_1T[0] * weights_T).sum()
        shown = weights if rule.ratio is not Ratio.TOKEN else shown_T[None]
        moved_1T = 0.5 * (log_probs_1T * mask_1T - batch.log_probs_1T).square()
        figures = (
            (kl_1T[0].detach() * shown_T).sum(),
            (entropy_1T[0].detach() * shown_T).sum(),
            (surrogate.clipped.detach() * shown).sum(),
            (moved_1T[0].detach() * shown_T).sum(),
            (surrogate.ratios * shown).sum(),
        )
        return Loss(total=total, count=count.to(torch.int32), metrics=figures)

    def _weights(self, row: PackedBatch, kind: Aggregation) -> tuple[torch.Tensor, torch.Tensor]:
        return token_weights(
            row.mask_1T[0],
            row.documents_T,
            num_sequences=row.num_documents + 1,
            kind=kind,
            longest=self._rule.longest,
        )

    def _surrogate(
        self, batch: PolicyBatch, log_probs_1T: torch.Tensor, weights_T: torch.Tensor
    ) -> tuple[Surrogate, torch.Tensor]:
        """The clipped losses, of tokens [1, T] or of answers [D], and their weights."""
        rule, row = self._rule, batch.row
        mask, log_probs, old, advantages = row.mask_1T, log_probs_1T, batch.log_probs_1T, batch.advantages_1T
        weights = weights_T[None]
        if rule.ratio is not Ratio.TOKEN:
            lengths_D = row.sums(mask)
            divisor_D = lengths_D.clamp(min=1)
            log_probs, old, advantages = (row.sums(x * mask) for x in (log_probs, old, advantages))
            advantages = advantages / divisor_D  # the same for every token of an answer
            if rule.ratio is Ratio.MEAN:
                log_probs, old = log_probs / divisor_D, old / divisor_D
            mask = weights = (lengths_D > 0).float()
        surrogate = clipped_surrogate(
            log_probs,
            old,
            advantages=advantages,
            mask=mask,
            clip_low=rule.clip_low,
            clip_high=rule.clip_high,
        )
        return surrogate, weights


class ProximalPolicy(PolicyGradient):
    """The same, and a value that is learned beside it: PPO.

    Args:
        rule: how tokens are weighed and clipped.
        value_coefficient: weight of the value's loss.
        value_clip: how far the value may move.
        fixed: as ``PackedSamples``.
    """

    METRICS = (*PolicyGradient.METRICS, "loss/policy_avg", "loss/value_avg")

    def __init__(self, rule: Rule, *, value_coefficient: float, value_clip: float, fixed: bool) -> None:
        super().__init__(rule, fixed=fixed)
        self._coefficient, self._clip = value_coefficient, value_clip

    def forward(
        self, model: torch.nn.Module, batch: PolicyBatch
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
        """Losses of the row's answers and of their values."""
        output, scores = score(model, batch.row, temperature=self._rule.temperature, entropy=True)

        def loss(output_1TV: torch.Tensor) -> Loss:
            logits_1TV, values_1T = with_values(output_1TV)
            policy = self._loss(batch, scores(logits_1TV))
            assert batch.values_1T is not None and batch.returns_1T is not None
            value_1T = value_losses(
                values_1T, batch.values_1T, returns=batch.returns_1T, mask=batch.row.mask_1T, clip=self._clip
            )
            # Every token weighs the same in PPO.
            value = value_1T.sum()
            return Loss(
                total=policy.total + self._coefficient * value,
                count=policy.count,
                metrics=(*policy.metrics, policy.total.detach(), value.detach()),
            )

        return output, loss


def with_values(output_1TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1, T, V / tensor ranks], which may be overwritten, and values [1, T], of a model that gives both."""
    return output_1TV[..., :-1].contiguous(), output_1TV[..., -1].float()


def _answers(row: PackedBatch) -> np.ndarray:
    """Where the labels are tokens of an answer, bool [1, T]."""
    found: np.ndarray = row.mask_1T.cpu().numpy() > 0
    return found
