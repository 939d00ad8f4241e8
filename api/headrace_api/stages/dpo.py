"""The dpo stage: a model and answers that people prefer or do not -> a model that prefers as they do."""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from headrace_api.base import FieldError, api_rules, rule
from headrace_api.stages.base import ArtifactKind
from headrace_api.stages.finetune import OFFLINE_RULES, OfflineFinetune, Sampled
from headrace_api.stages.training import Schedule


class DpoLoss(StrEnum):
    """How a preference becomes a loss."""

    SIGMOID = "sigmoid"
    """arXiv 2305.18290, eq. 7."""
    IPO = "ipo"
    """arXiv 2310.12036, eq. 17."""
    CDPO = "cdpo"
    """Soft labels: labelSmoothing of them are wrong."""
    ROBUST = "robust"
    """The same assumption, unbiased: arXiv 2403.00409."""
    HINGE = "hinge"
    """arXiv 2305.10425."""
    ORPO = "orpo"
    """The likelihood of the chosen side, and the odds against the rejected one; no reference model: arXiv 2403.07691, eq. 6."""
    SIMPO = "simpo"
    """Mean log-probabilities with a margin; no reference model: arXiv 2405.14734, eq. 6."""
    KTO = "kto"
    """Single answers that are wanted or not: arXiv 2402.01306, eq. 8."""

    @property
    def needs_reference(self) -> bool:
        """Whether the model is held to the one that it starts from."""
        return self not in (DpoLoss.ORPO, DpoLoss.SIMPO)


_SMOOTHED = ("cdpo", "robust")
_ONLY_SMOOTHED = "is of the losses cdpo and robust; leave it out, or choose one of them"
_OWN_LENGTHS = ("orpo", "simpo", "kto")
_ONLY_OWN_LENGTHS = (
    "is of sigmoid, ipo, cdpo, robust and hinge: orpo and simpo always take means, kto never does; leave it out"
)
_ONLY_SIMPO = "is of the loss simpo; leave it out, or choose simpo"
_ONLY_KTO = "is of the loss kto; leave it out, or choose kto"
_MISMATCHED = "kto takes its reference point from completions of other examples of the step; use 2 or more"


class Dpo(OfflineFinetune, Sampled):
    """Direct preference optimization: train on pairs of a chosen and a rejected answer, held to the model that it starts from."""

    model_config = api_rules(
        *OFFLINE_RULES,
        rule(
            f"double(self.labelSmoothing) == 0.0 || self.loss in {[*_SMOOTHED]}",
            f"labelSmoothing {_ONLY_SMOOTHED}",
        ),
        rule(
            f"!self.lengthNormalized || !(self.loss in {[*_OWN_LENGTHS]})",
            f"lengthNormalized {_ONLY_OWN_LENGTHS}",
        ),
        rule("!has(self.gamma) || self.loss == 'simpo'", f"gamma {_ONLY_SIMPO}"),
        rule("!has(self.desirableWeight) || self.loss == 'kto'", f"desirableWeight {_ONLY_KTO}"),
        rule("!has(self.undesirableWeight) || self.loss == 'kto'", f"undesirableWeight {_ONLY_KTO}"),
        rule("self.loss != 'kto' || self.globalBatchSize > 1", f"globalBatchSize: {_MISMATCHED}"),
    )

    KIND = "dpo"
    GIVES = ArtifactKind.CHECKPOINT

    loss: DpoLoss = DpoLoss.SIGMOID
    """loss is how a preference becomes a loss: sigmoid, ipo, cdpo, robust, hinge, orpo, simpo or kto. For kto, records have prompt, completion and label, or are pairs, each side of which is an example."""
    beta: float | None = Field(None, gt=0, le=1000)
    """beta is how strongly the model is held to the one that it starts from; the weight of the odds ratio in orpo, the scale of log-probabilities in simpo. If unset, 2 in simpo, and 0.1 elsewhere."""
    gamma: float | None = Field(None, ge=0, le=1000)
    """gamma is the margin by which simpo's chosen side must win; 1 if unset."""
    desirable_weight: float | None = Field(None, gt=0, le=1000)
    """desirableWeight is the weight of kto's wanted examples; 1 if unset. Where there are few of them, raise it until both kinds weigh about the same."""
    undesirable_weight: float | None = Field(None, gt=0, le=1000)
    """undesirableWeight is the weight of kto's unwanted examples; 1 if unset."""
    label_smoothing: float = Field(0.0, ge=0, le=0.49)
    """labelSmoothing is the probability that a label is wrong; for cdpo and robust."""
    length_normalized: bool = False
    """lengthNormalized takes the mean log-probability of an answer's tokens, not their sum."""
    schedule: Schedule = Schedule(learning_rate=1e-6)
    """schedule is the learning rate over the run; learningRate is 1e-6 if the block is left out."""

    @property
    def strength(self) -> float:
        """``beta``, or its default for the loss."""
        # SimPO's mean log-probabilities are small numbers: its authors use 2 to 2.5.
        return self.beta or (2.0 if self.loss is DpoLoss.SIMPO else 0.1)

    @model_validator(mode="after")
    def _options_are_of_the_loss(self) -> Self:
        if self.label_smoothing and self.loss not in _SMOOTHED:
            raise FieldError("labelSmoothing", self.label_smoothing, _ONLY_SMOOTHED)
        if self.length_normalized and self.loss in _OWN_LENGTHS:
            raise FieldError("lengthNormalized", self.length_normalized, _ONLY_OWN_LENGTHS)
        if self.gamma is not None and self.loss is not DpoLoss.SIMPO:
            raise FieldError("gamma", self.gamma, _ONLY_SIMPO)
        if self.desirable_weight is not None and self.loss is not DpoLoss.KTO:
            raise FieldError("desirableWeight", self.desirable_weight, _ONLY_KTO)
        if self.undesirable_weight is not None and self.loss is not DpoLoss.KTO:
            raise FieldError("undesirableWeight", self.undesirable_weight, _ONLY_KTO)
        if self.loss is DpoLoss.KTO and self.global_batch_size < 2:
            raise FieldError("globalBatchSize", self.global_batch_size, _MISMATCHED)
        return self
