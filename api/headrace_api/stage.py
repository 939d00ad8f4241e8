"""One stage of a run: a name, compute resources, and exactly one typed block."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from headrace_api.base import FieldError, Matches, Spec, api_rules, rule
from headrace_api.compute import Compute, cel_world
from headrace_api.parallelism import layout
from headrace_api.stages import (
    KINDS,
    Corpus,
    Deploy,
    Evaluate,
    Export,
    Pretrain,
    RunsAs,
    Shards,
    StageConfig,
    Tokenizer,
)

PartName = Annotated[
    str,
    Field(max_length=40),
    Matches(
        r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$",
        "write lower-case letters, digits and single hyphens, starting with a letter and ending with a letter or digit",
    ),
]
"""A name without two hyphens in a row, so that names joined by two hyphens stay unambiguous."""

_WORLD = cel_world("self")
_REPLICA = "(self.pretrain.parallelism.tensor * self.pretrain.parallelism.pipeline)"
_PER_PASS = f"(self.pretrain.microBatchSize * ({_WORLD} / {_REPLICA}))"
_ONE_BLOCK = f"a stage has exactly one typed block of {', '.join(KINDS)}"
_SEVERAL_RANKS = [kind for kind, config in KINDS.items() if config.RUNS_AS is not RunsAs.TASKS]


class Stage(Spec):
    """A name, compute resources, and exactly one typed block."""

    model_config = api_rules(
        rule(" + ".join(f"(has(self.{kind}) ? 1 : 0)" for kind in KINDS) + " == 1", _ONE_BLOCK),
        rule("has(self.pretrain) || self.compute.nodes == 1", "compute.nodes must be 1: only pretrain runs on several"),
        rule(
            f"{' || '.join(f'has(self.{kind})' for kind in _SEVERAL_RANKS)} || {_WORLD} <= self.compute.nodes",
            f"compute.ranksPerNode must be 1: only {', '.join(_SEVERAL_RANKS)} have several; leave out gpusPerNode too",
        ),
        rule(
            f"!has(self.pretrain) || {_WORLD} % {_REPLICA} == 0",
            "parallelism.tensor x parallelism.pipeline must divide the ranks of the gang, compute.nodes x compute.ranksPerNode",
        ),
        rule(
            f"!has(self.pretrain) || {_WORLD} % {_REPLICA} != 0 || self.pretrain.globalBatchSize % {_PER_PASS} == 0",
            "globalBatchSize must be a multiple of microBatchSize x data ranks (ranks / tensor / pipeline)",
        ),
        rule(
            "!has(self.pretrain) || self.pretrain.precision != 'fp8' || self.compute.gpusPerNode > 0",
            "precision fp8 needs GPUs with Transformer Engine; set compute.gpusPerNode, or use bf16",
        ),
    )

    name: PartName
    """name is unique in the run; later stages refer to it, and it names the stage's folder in storage."""
    compute: Compute = Field(default_factory=Compute)
    """compute is the stage's compute resources."""
    corpus: Corpus | None = None
    """corpus reads and cleans raw text."""
    tokenizer: Tokenizer | None = None
    """tokenizer trains or imports a tokenizer."""
    shards: Shards | None = None
    """shards tokenizes documents."""
    pretrain: Pretrain | None = None
    """pretrain trains a model from random weights."""
    evaluate: Evaluate | None = None
    """evaluate measures a model."""
    export: Export | None = None
    """export writes a Hugging Face folder."""
    deploy: Deploy | None = None
    """deploy serves an exported model."""

    @property
    def kind(self) -> str:
        """The name of the typed block."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def config(self) -> StageConfig:
        """The typed block."""
        block = getattr(self, self.kind)
        assert isinstance(block, StageConfig)
        return block

    @model_validator(mode="after")
    def _one_block(self) -> Self:
        blocks = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(blocks) != 1:
            said = " and ".join(blocks) if blocks else "none"
            raise FieldError("", said, _ONE_BLOCK)
        return self

    @model_validator(mode="after")
    def _gang_fits(self) -> Self:
        if self.pretrain is not None:
            try:
                self._check_pretrain(self.pretrain)
            except FieldError as error:
                raise FieldError(f"pretrain.{error.field}", error.value, error.remedy) from error
        elif self.compute.nodes > 1:
            raise FieldError("compute.nodes", self.compute.nodes, f"{self.kind} stages run on 1 node")
        if self.config.RUNS_AS is RunsAs.TASKS and self.compute.ranks > 1:
            remedy = f"{self.kind} stages run 1 process per node; leave it out"
            raise FieldError(f"compute.{self.compute.ranks_field}", self.compute.ranks, remedy)
        return self

    def _check_pretrain(self, pretrain: Pretrain) -> None:
        ranks = layout(pretrain.parallelism, pretrain.model.architecture, num_ranks=self.compute.world)
        per_pass = pretrain.micro_batch_size * ranks.data
        if pretrain.global_batch_size % per_pass:
            raise FieldError(
                "globalBatchSize",
                pretrain.global_batch_size,
                f"must be a multiple of microBatchSize x data ranks, {pretrain.micro_batch_size} x {ranks.data} = {per_pass}",
            )
        if pretrain.precision == "fp8" and self.compute.gpus_per_node == 0:
            raise FieldError(
                "precision", "fp8", "needs GPUs with Transformer Engine; set compute.gpusPerNode, or use bf16"
            )
