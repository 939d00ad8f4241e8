"""The shards stage: documents + tokenizer -> token ids in Megatron's .bin/.idx format, with a manifest of digests."""

from typing import ClassVar

from pydantic import Field

from headrace_api.base import MOST, Quantity
from headrace_api.stages.base import ArtifactKind, Inputs, RunsAs, StageConfig, StageName


class ShardsInputs(Inputs):
    """What is tokenized, and by which tokenizer."""

    ACCEPTS: ClassVar[dict[str, ArtifactKind]] = {
        "corpus": ArtifactKind.CORPUS,
        "tokenizer": ArtifactKind.TOKENIZER,
    }

    corpus: StageName
    """corpus names the corpus stage whose documents are tokenized."""
    tokenizer: StageName
    """tokenizer names the tokenizer stage."""


class Shards(StageConfig):
    """Tokenize a corpus into shards for training and validation."""

    KIND = "shards"
    GIVES = ArtifactKind.SHARDS
    RUNS_AS = RunsAs.TASKS

    from_: ShardsInputs = Field(alias="from")
    """from names the corpus and the tokenizer."""
    shard_bytes: Quantity = Field(2**30, ge=2**16, le=MOST)
    """shardBytes is the size above which a new shard starts."""
    validation_ratio: float = Field(0.02, gt=0, lt=1)
    """validationRatio is the fraction of documents, chosen by the hash of their text, that is held out for validation."""
