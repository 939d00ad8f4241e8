"""``manifest.json``: describes a run's token shards, with a digest for every file.

The ``shards`` stage writes it after the last shard; ``reader`` and the evaluate stage read it.
"""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from headrace_api.artifact import canonical_digest
from headrace_trainer.errors import StorageError
from headrace_trainer.formats.shards.split import Split

MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
UNIGRAM_FILE = "unigram.npy"
"""Occurrences of each token id in the training split: int64, one entry per id."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Strict):
    """One .bin/.idx pair."""

    split: Split
    prefix: str
    """The files are ``<prefix>.bin`` and ``<prefix>.idx``."""
    tokens: int
    documents: int
    bin_sha256: str
    idx_sha256: str


class Manifest(_Strict):
    """All shards of both splits, in token order."""

    dtype: Literal["uint16", "int32"]
    """Numpy type of a token in .bin files, little-endian."""
    vocab_size: int
    eod_id: int
    """Ends every document."""
    tokens: dict[Split, int]
    """Including end-of-document tokens."""
    documents: dict[Split, int]
    bytes: dict[Split, int]
    """UTF-8 bytes of the documents' texts, for losses in bits per byte."""
    shards: list[Shard]
    tokenizer_sha256: str
    """Digest of ``tokenizer/tokenizer.json``."""

    @property
    def digest(self) -> str:
        """Identifies the data: another manifest means another sample order."""
        return canonical_digest(self.model_dump(mode="json"))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` to ``folder``."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder of shards.

    Raises:
        StorageError: it is missing or unreadable.
    """
    path = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise StorageError(f"{path}: unreadable: {error}; rerun the shards stage") from error
