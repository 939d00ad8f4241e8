"""The dpo stage: a model and pairs of answers, of which people prefer one -> a model that prefers as they do."""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from headrace_api.base import FieldError, api_rules, rule
from headrace_api.stages.base import ArtifactKind
from headrace_api.stages.finetune import OFFLINE_RULES, OfflineFinetune
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


_SMOOTHED = ("cdpo", "robust")
_ONLY_SMOOTHED = "is of the losses cdpo and robust; leave it out, or choose one of them"


class Dpo(OfflineFinetune):
    """Direct preference optimization: train on pairs of a chosen and a rejected answer, held to the model that it starts from."""

    model_config = api_rules(
        *OFFLINE_RULES,
        rule(
            f"double(self.labelSmoothing) == 0.0 || self.loss in {[*_SMOOTHED]}",
            f"labelSmoothing {_ONLY_SMOOTHED}",
        ),
    )

    KIND = "dpo"
    GIVES = ArtifactKind.CHECKPOINT

    loss: DpoLoss = DpoLoss.SIGMOID
    """loss is how a preference becomes a loss: sigmoid, ipo, cdpo, robust or hinge."""
    beta: float = Field(0.1, gt=0, le=1000)
    """beta is how strongly the model is held to the one that it starts from."""
    label_smoothing: float = Field(0.0, ge=0, le=0.49)
    """labelSmoothing is the probability that a label is wrong; for cdpo and robust."""
    length_normalized: bool = False
    """lengthNormalized takes the mean log-probability of an answer's tokens, not their sum."""
    schedule: Schedule = Field(default_factory=lambda: Schedule(learning_rate=1e-6))
    """schedule is the learning rate over the run; learningRate is 1e-6 if the block is left out."""

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Self:
        if self.label_smoothing and self.loss not in _SMOOTHED:
            raise FieldError("labelSmoothing", self.label_smoothing, _ONLY_SMOOTHED)
        return self
