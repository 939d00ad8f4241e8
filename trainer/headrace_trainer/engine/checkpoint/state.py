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

from headrace_trainer.engine.checkpoint.optimizer_state import sharded_moments
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

_MODEL_FORM = {
    # The gate and up matrices of SwiGLU are parts of one tensor, wherever tensor parallelism cuts them.
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
    _write(_sharded(state), folder)


def save_weights(model: MegatronModule, folder: Path) -> None:
    """Write weights alone, for evaluation and export. Every rank calls.

    Raises:
        StorageError: the folder cannot be written.
    """
    _write({"model": _sharded_model(model)}, folder)


def load_state(state: TrainState, folder: Path) -> str | None:
    """Read what ``save_state`` wrote, under whatever layout. Every rank calls.

    Returns:
        Why the folder could not be read, which other ranks may not know; None if it was.
    """
    state.optimizer.load_state_dict(state.optimizer.state_dict())  # allocates the moments
    try:
        loaded = _read(_sharded(state), folder)
        state.model.load_state_dict(loaded["model"])
        state.optimizer.load_state_dict(loaded["optimizer"])
    except torch.OutOfMemoryError:
        raise
    except CheckpointException as error:  # not an Exception: torch derives it from BaseException
        return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items()) or str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    with torch.no_grad():
        for name, moment in _sharded(state)["moments"].items():
            moment.data.copy_(loaded["moments"][name])
    return None


def load_weights(model: MegatronModule, folder: Path) -> None:
    """Read the weights from a folder of ``save_weights`` or ``save_state``, under whatever layout. Every rank calls."""
    model.load_state_dict(_read({"model": _sharded_model(model)}, folder)["model"])


def _sharded(state: TrainState) -> dict[str, Any]:
    model = _sharded_model(state.model)
    return {
        "model": model,
        "moments": sharded_moments(state.optimizer, model),
        "optimizer": state.optimizer.state_dict(),
    }


def _sharded_model(model: MegatronModule) -> dict[str, Any]:
    sharded: dict[str, Any] = model.sharded_state_dict(metadata={**_MODEL_FORM, "dp_cp_group": _replicas()})
    return sharded


def _replicas() -> torch.distributed.ProcessGroup:
    group: torch.distributed.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def _write(sharded: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    # One file a rank; replicas of the same weights share the writing.
    strategy = FullyParallelSaveStrategyWrapper(
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1), _replicas(), True
    )
    _as_storage_error(
        lambda: dist_checkpointing.save(sharded, str(folder), strategy, content_metadata=_MODEL_FORM), folder
    )


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
