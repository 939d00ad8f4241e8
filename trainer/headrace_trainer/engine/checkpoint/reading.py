"""Which files of a checkpoint hold what a rank loads: the chunks that overlap with its own.

Replicas share the reading of what they have in common: a rank asks for its share only, and gets the rest from them.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from headrace_trainer.engine.checkpoint.files import CheckpointFiles
from headrace_trainer.engine.device.megatron import (
    ShardedObject,
    ShardedTensor,
    TorchDistLoadShardedStrategy,
    nested_values,
)


class FetchingLoadStrategy(TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """Loads tensors from files that are fetched when it is known which they are."""

    def __init__(self, files: CheckpointFiles) -> None:
        super().__init__()
        self._files = files
        self._metadata: Metadata | None = None

    def load(self, sharded_state_dict: Mapping[str, Any], checkpoint_dir: Path) -> Any:
        """Fetch, then load. Every rank calls."""
        self._metadata = self._metadata or FileSystemReader(str(checkpoint_dir)).read_metadata()
        self._files.need(files_read(sharded_state_dict, self._metadata))
        return super().load(sharded_state_dict, checkpoint_dir)


def files_read(sharded: Mapping[str, Any], metadata: Metadata) -> set[str]:
    """Names of the files with chunks that overlap with a sharded state dict."""
    stored = _stored(metadata)
    found: set[str] = set()
    for entry in nested_values(sharded):
        if isinstance(entry, ShardedObject):
            found |= {file for _, _, file in stored[entry.unique_key]}
        elif isinstance(entry, ShardedTensor) and stored[entry.key]:
            begins, ends, files = zip(*stored[entry.key], strict=True)
            begin = np.array(entry.global_offset)
            end = begin + np.array((1,) * entry.prepend_axis_num + tuple(entry.local_shape))
            overlaps = ((np.array(begins) < end) & (np.array(ends) > begin)).all(axis=1)
            found |= {files[i] for i in np.flatnonzero(overlaps)}
    return found


def _stored(metadata: Metadata) -> defaultdict[str, list[tuple[tuple[int, ...], tuple[int, ...], str]]]:
    """Each key's chunks: where one begins, where it ends, and the file that holds it."""
    sizes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key, entry in metadata.state_dict_metadata.items()
        for chunk in getattr(entry, "chunks", [])
    }
    stored = defaultdict(list)
    for index, info in metadata.storage_data.items():
        begin = tuple(index.offset or ())
        size = sizes.get((index.fqn, begin), ())
        end = tuple(b + s for b, s in zip(begin, size, strict=True))
        stored[index.fqn].append((begin, end, info.relative_path))
    return stored
