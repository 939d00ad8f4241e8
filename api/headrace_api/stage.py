"""One stage of a run: a name, compute resources, and exactly one typed block."""

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import Field, model_validator

from headrace_api.base import FieldError, JsonSchema, Matches, Spec, api_rules, rule
from headrace_api.compute import Compute, cel_world
from headrace_api.parallelism import layout, split_model
from headrace_api.stages import (
    KINDS,
    Constitutional,
    Corpus,
    Deploy,
    Dpo,
    Evaluate,
    Export,
    Pretrain,
    Reward,
    Rl,
    RunsAs,
    Sft,
    Shards,
    StageConfig,
    StartsFromModel,
    Tokenizer,
    Training,
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
_ONE_BLOCK = f"a stage has exactly one typed block of {', '.join(KINDS)}"
_TRAINING = [kind for kind, config in KINDS.items() if issubclass(config, Training)]
_ON_A_MESH = [kind for kind, config in KINDS.items() if issubclass(config, Training | StartsFromModel)]
_IS_ON_A_MESH = " || ".join(f"has(self.{kind})" for kind in _ON_A_MESH)
_SEVERAL_RANKS = [kind for kind, config in KINDS.items() if config.RUNS_AS is not RunsAs.TASKS]


def _gang_rules(kind: str) -> Iterator[JsonSchema]:
    """How the ranks of a stage must fit its layout and, where it trains, its batches."""
    block = f"self.{kind}"
    replica = f"({block}.parallelism.tensor * {block}.parallelism.pipeline)"
    per_pass = f"({block}.microBatchSize * ({_WORLD} / {replica}))"
    yield rule(
        f"!has({block}) || {_WORLD} % {replica} == 0",
        f"{kind}.parallelism.tensor x pipeline must divide the ranks of the gang, compute.nodes x compute.ranksPerNode",
    )
    if kind in _TRAINING:
        yield rule(
            f"!has({block}) || {_WORLD} % {replica} != 0 || {block}.globalBatchSize % {per_pass} == 0",
            f"{kind}.globalBatchSize must be a multiple of microBatchSize x data ranks (ranks / tensor / pipeline)",
        )
    yield rule(
        f"!has({block}) || {block}.precision != 'fp8' || self.compute.gpusPerNode > 0",
        f"{kind}.precision fp8 needs GPUs with Transformer Engine; set compute.gpusPerNode, or use bf16",
    )


class Stage(Spec):
    """A name, compute resources, and exactly one typed block."""

    model_config = api_rules(
        rule(" + ".join(f"(has(self.{kind}) ? 1 : 0)" for kind in KINDS) + " == 1", _ONE_BLOCK),
        rule(
            f"{_IS_ON_A_MESH} || self.compute.nodes == 1",
            f"compute.nodes must be 1: only {' and '.join(_ON_A_MESH)} run on several",
        ),
        rule(
            f"{' || '.join(f'has(self.{kind})' for kind in _SEVERAL_RANKS)} || {_WORLD} <= self.compute.nodes",
            f"compute.ranksPerNode must be 1: only {', '.join(_SEVERAL_RANKS)} have several; leave out gpusPerNode too",
        ),
        *(rule for kind in _ON_A_MESH for rule in _gang_rules(kind)),
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
    sft: Sft | None = None
    """sft trains a model on demonstrations."""
    reward: Reward | None = None
    """reward trains a model that scores answers."""
    rl: Rl | None = None
    """rl trains a model on its own answers to prompts, by what they are rewarded with."""
    dpo: Dpo | None = None
    """dpo trains a model on pairs of answers, of which one is preferred."""
    constitutional: Constitutional | None = None
    """constitutional lets a model criticize and revise its answers, or choose between them, and writes records of that."""
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

    @property
    def training(self) -> Training | None:
        """The typed block of a stage that trains; None for others."""
        return self.config if isinstance(self.config, Training) else None

    @model_validator(mode="after")
    def _one_block(self) -> Self:
        blocks = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(blocks) != 1:
            said = " and ".join(blocks) if blocks else "none"
            raise FieldError("", said, _ONE_BLOCK)
        return self

    @model_validator(mode="after")
    def _gang_fits(self) -> Self:
        if isinstance(self.config, Training | StartsFromModel):
            try:
                self._check_mesh(self.config)
            except FieldError as error:
                raise FieldError(f"{self.kind}.{error.field}", error.value, error.remedy) from error
        elif self.compute.nodes > 1:
            raise FieldError("compute.nodes", self.compute.nodes, f"{self.kind} stages run on 1 node")
        if self.config.RUNS_AS is RunsAs.TASKS and self.compute.ranks > 1:
            remedy = f"{self.kind} stages run 1 process per node; leave it out"
            raise FieldError(f"compute.{self.compute.ranks_field}", self.compute.ranks, remedy)
        return self

    def _check_mesh(self, config: Training | StartsFromModel) -> None:
        if self.pretrain is not None:
            split_model(self.pretrain.parallelism, self.pretrain.model.architecture)
        ranks = layout(config.parallelism, num_ranks=self.compute.world)
        if isinstance(config, Training):
            _check_batches(config, num_replicas=ranks.data)
        if config.precision == "fp8" and self.compute.gpus_per_node == 0:
            raise FieldError(
                "precision", "fp8", "needs GPUs with Transformer Engine; set compute.gpusPerNode, or use bf16"
            )


def _check_batches(training: Training, *, num_replicas: int) -> None:
    per_pass = training.micro_batch_size * num_replicas
    if training.global_batch_size % per_pass:
        raise FieldError(
            "globalBatchSize",
            training.global_batch_size,
            f"must be a multiple of microBatchSize x data ranks, {training.micro_batch_size} x {num_replicas} = {per_pass}",
        )
