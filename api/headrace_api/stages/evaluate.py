"""The evaluate stage: how well a model predicts held-out text, and whether that is good enough to continue."""

import operator
import re
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from headrace_api.base import MOST, FieldError, Matches, Name, Quantity, Spec, StoredUri, api_rules, rule
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
EXACT_MATCH = "exactMatch/"
"""Prefix of the metrics of ``exactMatch``, followed by the name of a question set."""


class QuestionSet(Spec):
    """Questions with one right answer each."""

    name: Name
    """name is part of the metric's name, exactMatch/NAME."""
    uri: StoredUri
    """uri locates the questions, records with prompt and completion: a file, a folder, an s3:// prefix or a pattern. A relative path is relative to the manifest."""
    max_tokens: int = Field(64, ge=1, le=65_536)
    """maxTokens bounds the length of an answer; one that does not end within it is wrong."""

    @property
    def metric(self) -> str:
        """Name of the metric: the share of correct answers."""
        return f"{EXACT_MATCH}{self.name}"


_MEASURED = f"metric in {list(METRICS)} || (has(self.exactMatch) && self.exactMatch.exists(q, '{EXACT_MATCH}' + q.name == metric))"
_BOUND_ONE = f"bound one of {', '.join(METRICS)}, or {EXACT_MATCH}NAME of a question set"


class Evaluate(StageConfig):
    """Measure a model on held-out text, compared with a unigram model of the same vocabulary, and on questions."""

    model_config = api_rules(
        rule(f"!has(self.require) || self.require.all(metric, {_MEASURED})", f"require: {_BOUND_ONE}")
    )

    KIND = "evaluate"
    GIVES = ArtifactKind.EVALUATION
    RUNS_AS = RunsAs.GANG

    from_: EvaluateInputs = Field(alias="from")
    """from names the model and the shards."""
    tasks: list[Task] = Field(default_factory=lambda: [Task.PERPLEXITY], min_length=1, max_length=8)
    """tasks are the measurements to make."""
    max_tokens: Quantity = Field(1_000_000, ge=2, le=MOST)
    """maxTokens bounds the number of validation tokens to read."""
    exact_match: list[QuestionSet] = Field(default_factory=list, max_length=8)
    """exactMatch lists question sets, answered greedily in the model's chat template; an answer is right if it equals the record's completion, ignoring white space around it."""
    require: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=32), _BOUND]] = Field(
        default_factory=dict, max_length=16
    )
    """require maps a metric (loss, perplexity, bitsPerByte, unigramPerplexity, unigramRatio, exactMatch/NAME) to a bound, such as unigramRatio: ">=3"; a missed bound fails the stage."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [questions.name for questions in self.exact_match]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise FieldError("exactMatch", twice, "is used twice; names must be unique in a stage")
        return self

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = {*METRICS, *(questions.metric for questions in self.exact_match)}
        unknown = next((metric for metric in self.require if metric not in known), None)
        if unknown is not None:
            raise FieldError("require", unknown, f"is not measured; {_BOUND_ONE}")
        return self
