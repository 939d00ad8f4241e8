"""Token samples for the training loop, by global index: memory-mapped, in an order that nothing shifts.

In: the output folder of a ``shards`` stage. Out: windows of ``sequence_length + 1`` ids. A split's stream is its shards
end to end; window ``i`` starts at token ``i * sequence_length``. Neither the number of ranks nor the length of training
matters, so the number of consumed samples is the whole data state.

Shapes: T = sequence_length.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace_trainer.artifacts import sha256_file
from headrace_trainer.errors import StorageError, UserError
from headrace_trainer.formats.shards.manifest import Manifest, Shard, read_manifest
from headrace_trainer.formats.shards.order import shuffle_key, shuffled
from headrace_trainer.formats.shards.split import Split


class TokenDataset:
    """The samples of one split.

    Attributes:
        manifest: describes the shards.
        num_samples: samples per epoch.
        num_tokens: tokens in the split.
    """

    def __init__(self, folder: Path, split: str, sequence_length: int, seed: int, *, verify: bool = True) -> None:
        """Map the shards.

        Args:
            folder: a local copy of a shards artifact.
            split: ``train``, reshuffled every epoch, or ``validation``, whose order is the same for every run, so that
            any
                prefix of it is the same fair sample.
            sequence_length: T, in tokens.
            seed: determines the order of ``train``.
            verify: whether to check the shards' digests; once per node is enough.

        Raises:
            StorageError: a shard is missing, or its digest does not match the manifest.
            UserError: the split has too few tokens for one sample.
        """
        self.manifest = read_manifest(folder)
        self._split, self._sequence_length, self._seed = Split(split), sequence_length, seed
        shards = [s for s in self.manifest.shards if s.split is self._split]
        if verify:
            verify_shards(folder, shards)
        self._parts = [_map(folder, shard, self.manifest) for shard in shards]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.num_tokens = int(self._ends[-1]) if shards else 0
        self.num_samples = max(0, self.num_tokens - 1) // sequence_length
        self._check_enough()
        self._manifest_digest = self.manifest.digest

    def sample(self, index: int) -> NDArray[np.int64]:
        """The ``index``-th sample consumed since the run began.

        Args:
            index: the global counter, from 0, continuing across epochs.

        Returns:
            ``[T + 1]`` token ids: inputs are all but the last, targets all but the first.
        """
        epoch, position = divmod(index, self.num_samples)
        first = self._place(epoch, position) * self._sequence_length
        return self._read(first, first + self._sequence_length + 1)

    def _place(self, epoch: int, position: int) -> int:
        """The window at the ``position``-th place of an epoch."""
        seed, epoch = (self._seed, epoch) if self._split is Split.TRAIN else (0, 0)
        key = shuffle_key(seed=seed, epoch=epoch, manifest_digest=self._manifest_digest)
        return shuffled(position, num_samples=self.num_samples, key=key)

    def _read(self, first: int, stop: int) -> NDArray[np.int64]:
        """Tokens [first, stop) of the stream; a window may span shards."""
        pieces, i = [], int(np.searchsorted(self._ends, first, side="right"))
        while first < stop:
            begin = int(self._ends[i]) - len(self._parts[i])
            piece = self._parts[i][first - begin : stop - begin]
            pieces.append(piece.astype(np.int64))
            first, i = first + len(piece), i + 1
        return np.concatenate(pieces)

    def _check_enough(self) -> None:
        if self.num_samples == 0:
            raise UserError(
                f"sequenceLength: {self._sequence_length}: the {self._split} split has {self.num_tokens} tokens, but "
                f"one sample needs {self._sequence_length + 1}; shorten the sequence, give the corpus stage more text"
                + (", or raise shards.validationRatio" if self._split is Split.VALIDATION else "")
            )


def verify_shards(folder: Path, shards: list[Shard]) -> None:
    """Check every file against its digest in the manifest.

    Raises:
        StorageError: names the first file that is missing or differs.
    """
    for shard in shards:
        for suffix, expected in ((".bin", shard.bin_sha256), (".idx", shard.idx_sha256)):
            _verify_file(folder / f"{shard.prefix}{suffix}", expected=expected)


def _verify_file(path: Path, *, expected: str) -> None:
    if not path.is_file():
        raise StorageError(f"{path}: the shard is missing; rerun the shards stage")
    found = sha256_file(path)
    if found != expected:
        raise StorageError(
            f"{path}: the shard is corrupt: sha256 is {found}, the manifest says {expected}; rerun the shards stage"
        )


def _map(folder: Path, shard: Shard, manifest: Manifest) -> NDArray[np.uint16] | NDArray[np.int32]:
    return np.memmap(folder / f"{shard.prefix}.bin", dtype=np.dtype(manifest.dtype).newbyteorder("<"), mode="r")
