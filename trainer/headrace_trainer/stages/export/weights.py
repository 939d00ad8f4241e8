"""Read the weights of a ``torch_dist`` checkpoint as whole tensors, in one process, from any layout."""

import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_OPTIMIZER = "optimizer."
_MODEL = "model."


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight by its name in the checkpoint; layers are stacked on the first dimension.

    Args:
        folder: written by ``checkpoint.state.save_weights`` or ``save_state``.
    """
    stored = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    weights: dict[str, torch.Tensor] = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if isinstance(meta, TensorStorageMetadata) and not name.startswith(_OPTIMIZER)
    }
    with warnings.catch_warnings():
        # One process without a group is intended.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state_dict_loader.load(weights, storage_reader=FileSystemReader(str(folder)), no_dist=True)
    return {name.removeprefix(_MODEL): tensor for name, tensor in weights.items()}
