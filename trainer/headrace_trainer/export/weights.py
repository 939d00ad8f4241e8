"""The weights of a ``torch_dist`` checkpoint as whole tensors, in one process, whatever layout wrote them."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_OPTIMIZER = "optimizer."
_MODEL = "model."


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight, by its name in the checkpoint; layers are stacked on the first dimension.

    Args:
        folder: what ``checkpoint.state.save_weights`` or ``save_state`` wrote.
    """
    reader = FileSystemReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    weights: dict[str, torch.Tensor] = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if isinstance(meta, TensorStorageMetadata) and not name.startswith(_OPTIMIZER)
    }
    dcp.load(weights, storage_reader=FileSystemReader(str(folder)), no_dist=True)
    return {name.removeprefix(_MODEL): tensor for name, tensor in weights.items()}
