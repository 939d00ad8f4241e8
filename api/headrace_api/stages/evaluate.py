"""The evaluate stage: how well a model predicts held-out text, and whether that is good enough to continue."""

import operator
import re
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from headrace_api.base import MOST, FieldError, Matches, Quantity, rule
from headrace_api.stages.base import ArtifactKind, Inputs, RunsAs, StageConfig, StageName

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_BOUND = Matches(r"^ *(>=|<=|>|<) *[0-9]+(\.[0-9]+)? *$", "write a comparison with a number, such as >=3 or <40")


class Task(StrEnum):
    """What is measured."""

    PERPLEXITY = "perplexity"


def meets(requirement: str, value: float) -> bool:
    """Whether ``value`` satisfies a requirement such as ``>=3`` or ``<40``."""
    sign, number = re.findall(r"[<>]=?|[0-9.]+", _BOUND.check(requirement))
    return _COMPARE[sign](value, float(number))


class EvaluateInputs(Inputs):
    """What is evaluated, and on what."""

    ACCEPTS: ClassVar[dict[str, ArtifactKind]] = {
        "model": ArtifactKind.CHECKPOINT,
        "shards": ArtifactKind.SHARDS,
    }

    model: StageName
    """model names the stage that trained the model."""
    shards: StageName
    """shards names the shards stage; its validation split is evaluated, its training split gives the unigram baseline."""


METRICS = ("loss", "perplexity", "bitsPerByte", "unigramPerplexity", "unigramRatio")
"""What the perplexity task measures; ``require`` may bound any of them."""
_KNOWN = rule(f"self.all(metric, metric in {list(METRICS)})", f"bound one of {', '.join(METRICS)}")


class Evaluate(StageConfig):
    """Measure a model on held-out text, compared with a unigram model of the same vocabulary."""

    KIND = "evaluate"
    GIVES = ArtifactKind.EVALUATION
    RUNS_AS = RunsAs.GANG

    from_: EvaluateInputs = Field(alias="from")
    """from names the model and the shards."""
    tasks: list[Task] = Field(default_factory=lambda: [Task.PERPLEXITY], min_length=1, max_length=8)
    """tasks are the measurements to make."""
    max_tokens: Quantity = Field(1_000_000, ge=2, le=MOST)
    """maxTokens bounds the number of validation tokens to read."""
    require: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=32), _BOUND]] = Field(
        default_factory=dict, max_length=16, json_schema_extra={"x-kubernetes-validations": [_KNOWN]}
    )
    """require maps a metric (loss, perplexity, bitsPerByte, unigramPerplexity, unigramRatio) to a bound, such as unigramRatio: ">=3"; a missed bound fails the stage."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        unknown = next((metric for metric in self.require if metric not in METRICS), None)
        if unknown is not None:
            raise FieldError("require", unknown, f"is not measured; bound one of {', '.join(METRICS)}")
        return self
