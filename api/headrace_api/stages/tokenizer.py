"""The tokenizer stage: cleaned documents -> a byte-level BPE tokenizer, or an import of an existing one."""

from enum import StrEnum
from typing import ClassVar, Self

from pydantic import Field, model_validator

from headrace_api.base import MOST, FieldError, Quantity, Spec, StoredUri, api_rules, rule
from headrace_api.stages.base import ArtifactKind, Inputs, RunsAs, StageConfig, StageName


class Algorithm(StrEnum):
    """How the vocabulary is learned."""

    BPE = "bpe"


class TokenizerInputs(Inputs):
    """What the tokenizer is trained on."""

    ACCEPTS: ClassVar[dict[str, ArtifactKind]] = {"corpus": ArtifactKind.CORPUS}

    corpus: StageName
    """corpus names the corpus stage whose documents are read."""


class TokenizerImport(Spec):
    """An existing tokenizer's files."""

    uri: StoredUri
    """uri is a folder with tokenizer.json, or with GPT-2's vocabulary (vocab.json or encoder.json) and merges (merges.txt or vocab.bpe)."""


_ONE_ORIGIN = "set either from.corpus, to train, or import.uri, to import; not both"


class Tokenizer(StageConfig):
    """Train a tokenizer on a corpus, or import one."""

    model_config = api_rules(rule("has(self.from) != has(self.__import__)", _ONE_ORIGIN))

    KIND = "tokenizer"
    GIVES = ArtifactKind.TOKENIZER
    RUNS_AS = RunsAs.TASKS

    from_: TokenizerInputs | None = Field(None, alias="from")
    """from names the corpus to train the tokenizer on."""
    import_: TokenizerImport | None = Field(None, alias="import")
    """import reads an existing tokenizer instead of training one."""
    algorithm: Algorithm = Algorithm.BPE
    """algorithm is how the vocabulary is learned: bpe is byte-level byte-pair encoding, as in GPT-2."""
    vocab_size: Quantity = Field(32_768, ge=300, le=1_000_000)
    """vocabSize is the number of tokens, including special tokens and the 256 bytes."""
    sample_bytes: Quantity = Field(2**30, ge=1, le=MOST)
    """sampleBytes bounds the amount of text to train on."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.from_ is None) == (self.import_ is None):
            raise FieldError("from", None, _ONE_ORIGIN)
        return self
