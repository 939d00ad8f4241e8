"""Model and optimizer <-> a folder of ``torch_dist`` files, by Megatron's distributed checkpointing.

In: this rank's part of a model and its optimizer. Out: a folder from which any other layout loads. Every rank calls;
each writes ``__<rank>_*.distcp`` into its own folder of that name, rank 0 also ``common.pt``, ``.metadata`` and, last,
``metadata.json``. ``checkpointer`` commits the folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from headrace_trainer.engine.device.megatron import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
    MegatronModule,
    MegatronOptimizer,
    StrictHandling,
    TorchDistSaveShardedStrategy,
    dist_checkpointing,
    get_default_load_sharded_strategy,
    parallel_state,
)
from headrace_trainer.errors import StorageError

_OPTIMIZER_FORM = {
    # Optimizer state is written by global weight, not by rank: any tensor x pipeline x data layout reads it.
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What training changes."""

    model: MegatronModule
    """This rank's part, without the wrapper for training."""
    optimizer: MegatronOptimizer


def is_own_file(name: str) -> bool:
    """Whether a file in a checkpoint's folder is one of those written here."""
    return name.endswith(".distcp") or name in (".metadata", "metadata.json", "common.pt")


def save_state(state: TrainState, folder: Path) -> None:
    """Write weights and optimizer state. Every rank calls.

    Args:
        state: what is saved.
        folder: an empty or missing folder, local to the node.

    Raises:
        StorageError: the folder cannot be written.
    """
    metadata = _metadata()
    _write(_sharded(state, metadata), folder, metadata)


def save_weights(model: MegatronModule, folder: Path) -> None:
    """Write weights alone, for evaluation and export. Every rank calls.

    Raises:
        StorageError: the folder cannot be written.
    """
    metadata = _metadata()
    _write({"model": model.sharded_state_dict(metadata=metadata)}, folder, metadata)


def load_state(state: TrainState, folder: Path) -> None:
    """Read what ``save_state`` wrote, under whatever layout. Every rank calls."""
    metadata = _metadata(dist_checkpointing.load_content_metadata(folder) or {})
    loaded = _read(_sharded(state, metadata, is_loading=True), folder)
    state.model.load_state_dict(loaded["model"])
    with torch.no_grad():
        state.optimizer.load_state_dict(loaded["optimizer"])


def load_weights(model: MegatronModule, folder: Path) -> None:
    """Read the weights from a folder of ``save_weights`` or ``save_state``, under whatever layout. Every rank calls."""
    loaded = _read({"model": model.sharded_state_dict(metadata=_metadata())}, folder)
    model.load_state_dict(loaded["model"])


def _metadata(saved: dict[str, Any] | None = None) -> dict[str, Any]:
    return {**_OPTIMIZER_FORM, **(saved or {}), "dp_cp_group": _replicas()}


def _replicas() -> torch.distributed.ProcessGroup:
    group: torch.distributed.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def _sharded(state: TrainState, metadata: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
    model = {"model": state.model.sharded_state_dict(metadata=metadata)}
    optimizer = state.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {**model, "optimizer": optimizer}


def _write(sharded: dict[str, Any], folder: Path, metadata: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    # One file a rank; replicas of the same weights share the writing.
    strategy = FullyParallelSaveStrategyWrapper(
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1), _replicas(), True
    )
    kept = {k: v for k, v in metadata.items() if k != "dp_cp_group"}  # a process group cannot be pickled
    _as_storage_error(lambda: dist_checkpointing.save(sharded, str(folder), strategy, content_metadata=kept), folder)


def _read(sharded: dict[str, Any], folder: Path) -> dict[str, Any]:
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), _replicas())
    loaded: dict[str, Any] = dist_checkpointing.load(
        sharded, str(folder), strategy, strict=StrictHandling.ASSUME_OK_UNEXPECTED
    )
    return loaded


def _as_storage_error(write: Callable[[], object], folder: Path) -> None:
    """Run ``write``. Where any rank could not write its files, all raise; only the first knows which and why."""
    try:
        write()
    except CheckpointException as error:
        said = (
            "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items()) or "another rank failed"
        )
        raise StorageError(f"{folder}: {said}: check that the scratch volume has space and can be written") from error
