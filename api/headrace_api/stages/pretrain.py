"""The pretrain stage: token shards -> a model."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from headrace_api.base import MOST, FieldError, JsonSchema, Part, Quantity, api_rules, cel_number, rule
from headrace_api.model import ModelSpec, cel_dimension
from headrace_api.parallelism import SPLIT_BY_TENSOR
from headrace_api.stages.base import ArtifactKind, Inputs, RunsAs, StageName
from headrace_api.stages.training import Training


class PretrainInputs(Inputs):
    """What the model is trained on."""

    ACCEPTS: ClassVar[dict[str, ArtifactKind]] = {"shards": ArtifactKind.SHARDS}

    shards: StageName
    """shards names the shards stage."""


def _divides(field: str, dimension: str) -> JsonSchema:
    return rule(
        f"{cel_dimension(dimension, model='self.model')} % self.parallelism.{field} == 0",
        f"parallelism.{field} must divide the model's {dimension}; choose a divisor of it",
    )


_WARMUP_TOKENS = "self.schedule.warmup * self.sequenceLength * self.globalBatchSize"


class Pretrain(Training):
    """Train a language model from random weights on token shards."""

    model_config = api_rules(
        *(_divides("tensor", dimension) for dimension in SPLIT_BY_TENSOR),
        _divides("pipeline", "layers"),
        rule(
            f"self.schedule.warmup == 0 || {cel_number('self.tokens')} > double({_WARMUP_TOKENS}) + 0.5",
            "schedule.warmup must be below the number of steps, tokens / (sequenceLength x globalBatchSize)",
        ),
    )

    KIND = "pretrain"
    GIVES = ArtifactKind.CHECKPOINT
    RUNS_AS = RunsAs.GANG

    from_: PretrainInputs = Field(alias="from")
    """from names the token shards."""
    model: ModelSpec
    """model is the architecture."""
    tokens: Annotated[Quantity, Part.EXTENT] = Field(ge=1, le=MOST)
    """tokens is how many tokens to train on; divided by the tokens per global batch and rounded up, it gives the number of steps."""

    document_mask: bool | None = None
    """documentMask lets each document of a sample attend only to itself, with positions that begin anew; if unset, or false, a token sees all that stands before it in the sample, other documents included."""

    @property
    def steps(self) -> int:
        """Optimizer steps in the whole stage."""
        return -(-self.tokens // self.tokens_per_step)

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.schedule.warmup >= self.steps:
            raise FieldError(
                "schedule.warmup", self.schedule.warmup, f"must be below the {self.steps} steps that tokens allows"
            )
        return self
