"""The evaluate stage: how well a model predicts held-out text, and whether that is good enough to go on."""

import operator
import re
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from headrace_api.base import Quantity
from headrace_api.stages.base import ArtifactKind, Inputs, RunsAs, StageConfig, StageName

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_REQUIREMENT = re.compile(r"^\s*(>=|<=|>|<)\s*([0-9]+(?:\.[0-9]+)?)\s*$")


class Task(StrEnum):
    """What is measured."""

    PERPLEXITY = "perplexity"


def meets(requirement: str, value: float) -> bool:
    """Whether ``value`` satisfies a requirement such as ``>=3`` or ``<40``."""
    match = _REQUIREMENT.match(requirement)
    if match is None:
        raise ValueError("write a comparison with a number, as >=3 or <40")
    return _COMPARE[match.group(1)](value, float(match.group(2)))


class EvaluateInputs(Inputs):
    """What is evaluated, on what."""

    ACCEPTS: ClassVar[dict[str, ArtifactKind]] = {
        "model": ArtifactKind.CHECKPOINT,
        "shards": ArtifactKind.SHARDS,
    }

    model: StageName
    """model names the stage that trained the model."""
    shards: StageName
    """shards names the stage with the validation shards, and with the training shards for the unigram baseline."""


METRICS = ("loss", "perplexity", "bitsPerByte", "unigramPerplexity", "unigramRatio")
"""What the perplexity task measures; ``require`` may bound each."""


class Evaluate(StageConfig):
    """Measure a model on held-out text, beside a unigram model of the same vocabulary."""

    KIND = "evaluate"
    GIVES = ArtifactKind.EVALUATION
    RUNS_AS = RunsAs.GANG

    from_: EvaluateInputs = Field(alias="from")
    """from names the model and the shards."""
    tasks: list[Task] = Field(default_factory=lambda: [Task.PERPLEXITY], min_length=1, max_length=8)
    """tasks are what is measured."""
    max_tokens: Quantity = Field(1_000_000, ge=2)
    """maxTokens bounds the validation tokens that are read."""
    require: dict[
        Annotated[str, Field(max_length=64)], Annotated[str, Field(pattern=_REQUIREMENT.pattern, max_length=32)]
    ] = Field(default_factory=dict)
    """require maps a metric (loss, perplexity, bitsPerByte, unigramPerplexity, unigramRatio) to a bound, as unigramRatio: ">=3"; the stage fails where one is missed."""

    @field_validator("require")
    @classmethod
    def _known(cls, require: dict[str, str]) -> dict[str, str]:
        for metric, bound in require.items():
            if metric not in METRICS:
                raise ValueError(f"{metric!r} is not measured; choose one of {', '.join(METRICS)}")
            meets(bound, 0.0)
        return require
