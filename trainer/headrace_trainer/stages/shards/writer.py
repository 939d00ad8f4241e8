"""Split token ids into Megatron .bin/.idx pairs of bounded size.

In: one document's ids after another. Out: ``<split>-00000.bin`` and ``.idx``, and a ``Shard`` for each pair.
"""

from collections.abc import Sequence
from pathlib import Path

from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile

from headrace_trainer.artifacts import sha256_file
from headrace_trainer.formats.shards.manifest import Shard
from headrace_trainer.formats.shards.split import Split

_TOKEN_BYTES = {"uint16": 2, "int32": 4}


class ShardWriter:
    """Writes the shards of one split.

    Attributes:
        shards: the finished pairs.
    """

    def __init__(self, folder: Path, split: Split, *, dtype: str, shard_bytes: int) -> None:
        self._folder, self._split = folder, split
        self._token_bytes, self._shard_bytes = _TOKEN_BYTES[dtype], shard_bytes
        self._file: MegatronTokenizedFile | None = None
        self._tokens = self._documents = 0
        self.shards: list[Shard] = []

    def write(self, ids: Sequence[int]) -> None:
        """Add a document. Starts a new shard if the current one would exceed ``shard_bytes``."""
        if self._file is None or (self._tokens + len(ids)) * self._token_bytes > self._shard_bytes:
            self.close()
            self._file = MegatronTokenizedFile(str(self._folder), self._prefix, token_size=self._token_bytes)
        self._file.write(ids)
        self._tokens, self._documents = self._tokens + len(ids), self._documents + 1

    def close(self) -> None:
        """Finish the open shard."""
        if self._file is None:
            return
        self._file.close()
        binary, index = (self._folder / f"{self._prefix}{suffix}" for suffix in (".bin", ".idx"))
        self.shards.append(
            Shard(
                split=self._split,
                prefix=self._prefix,
                tokens=self._tokens,
                documents=self._documents,
                bin_sha256=sha256_file(binary),
                idx_sha256=sha256_file(index),
            )
        )
        self._file, self._tokens, self._documents = None, 0, 0

    @property
    def _prefix(self) -> str:
        return f"{self._split}-{len(self.shards):05d}"
