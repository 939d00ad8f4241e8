"""Model and optimizer <-> a folder of ``torch_dist`` files, by Megatron's distributed checkpointing.

In: this rank's part of a model and its optimizer. Out: a folder from which any other layout loads. Every rank calls;
each writes ``__<rank>_*.distcp`` into its own folder of that name, rank 0 also ``common.pt``, ``.metadata`` and, last,
``metadata.json``. ``checkpointer`` commits the folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from headrace_trainer.engine.checkpoint.files import CheckpointFiles, Corrupt
from headrace_trainer.engine.checkpoint.optimizer_state import sharded_moments
from headrace_trainer.engine.checkpoint.reading import FetchingLoadStrategy
from headrace_trainer.engine.device.megatron import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
    MegatronModule,
    MegatronOptimizer,
    StrictHandling,
    TorchDistLoadShardedStrategy,
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


COMMITTING_FILES = (".metadata", "metadata.json")
"""What rank 0 writes once every rank has written."""
SHARED_FILES = (*COMMITTING_FILES, "common.pt")
"""What rank 0 writes, and every rank reads."""


def is_own_file(name: str) -> bool:
    """Whether a file in a checkpoint's folder is one of those written here."""
    return name.endswith(".distcp") or name in SHARED_FILES


class StateWriter:
    """Writes a training state again and again: what ranks agreed on at the first times is not asked again.

    Args:
        state: what is saved.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        # One file a rank; replicas of the same weights share the writing.
        self._strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1, cached_metadata=True), _replicas(), True
        )
        self._is_first = True

    def begin(self, folder: Path) -> "Write":
        """Take the state as it is now. Every rank calls; none writes yet, but rank 0 what all share.

        Args:
            folder: an empty or missing folder, local to the node.

        Raises:
            StorageError: the folder cannot be written.
        """
        with _storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            request = dist_checkpointing.save(
                _sharded(self._state),
                str(folder),
                self._strategy,
                content_metadata=_MODEL_FORM,
                async_sharded_save=True,
                validate_access_integrity=self._is_first,
            )
        self._is_first = False
        return Write(request, folder)


class Write:
    """A state that is to be written.

    Args:
        request: Megatron's: a function that writes buckets of tensors, and functions that end it together.
        folder: where to.
    """

    def __init__(self, request: Any, folder: Path) -> None:
        self._request, self._folder = request, folder
        # On a GPU: a copy in pinned memory. On a CPU the tensors themselves, which a fork sees as they are now.
        self._buckets = request.preload_fn() if request.preload_fn is not None else []

    def write(self) -> Any:
        """Write this rank's file. May be called in a fork of the rank, which must hand on what it returns."""
        if self._request.async_fn is None:
            return None
        rank, _, results = self._request.async_fn_args
        self._request.async_fn(rank, self._buckets, results, **self._request.async_fn_kwargs)
        return results.get_nowait()

    def let_go(self) -> None:
        """Forget the tensors, once a fork has them."""
        self._buckets = []

    def finish(self, written: Any) -> None:
        """Write what makes the folder a checkpoint, once every rank has written. Every rank calls.

        Args:
            written: what ``write`` returned on this rank.

        Raises:
            StorageError: on every rank, where any could not write.
        """
        if self._request.async_fn is not None:
            self._request.async_fn_args[2].put(written)
        with _storage_errors(self._folder):
            for finalize in self._request.finalize_fns:
                finalize()


def save_weights(model: MegatronModule, folder: Path) -> None:
    """Write weights alone, for evaluation and export. Every rank calls.

    Raises:
        StorageError: the folder cannot be written.
    """
    strategy = FullyParallelSaveStrategyWrapper(
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1), _replicas(), True
    )
    folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    with _storage_errors(folder):
        dist_checkpointing.save({"model": _sharded_model(model)}, str(folder), strategy, content_metadata=_MODEL_FORM)


def load_state(state: TrainState, files: CheckpointFiles) -> str | None:
    """Read what was written, under whatever layout, and fetch no more than that takes. Every rank calls.

    Returns:
        Why the checkpoint could not be read, which other ranks may not know; None if it was.

    Raises:
        StorageError: storage does not answer.
    """
    state.optimizer.load_state_dict(state.optimizer.state_dict())  # allocates the moments
    try:
        files.need(SHARED_FILES)
        loaded = _read(_sharded(state), files.folder, FetchingLoadStrategy(files))
        state.model.load_state_dict(loaded["model"])
        state.optimizer.load_state_dict(loaded["optimizer"])
    except (StorageError, torch.OutOfMemoryError):
        raise
    except CheckpointException as error:  # not an Exception: torch derives it from BaseException
        return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items()) or str(error)
    except Corrupt as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    with torch.no_grad():
        for name, moment in _sharded(state)["moments"].items():
            moment.data.copy_(loaded["moments"][name])
    return None


def load_weights(model: MegatronModule, folder: Path) -> None:
    """Read the weights from a folder with a checkpoint, under whatever layout. Every rank calls."""
    loaded = _read({"model": _sharded_model(model)}, folder, get_default_load_sharded_strategy(str(folder)))
    model.load_state_dict(loaded["model"])


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


def _read(sharded: dict[str, Any], folder: Path, strategy: TorchDistLoadShardedStrategy) -> dict[str, Any]:
    shared = FullyParallelLoadStrategyWrapper(strategy, _replicas())
    loaded: dict[str, Any] = dist_checkpointing.load(
        sharded, str(folder), shared, strict=StrictHandling.ASSUME_OK_UNEXPECTED
    )
    return loaded


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Where any rank could not write its files, all raise; only the first knows which and why."""
    try:
        yield
    except CheckpointException as error:
        said = (
            "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items()) or "another rank failed"
        )
        raise StorageError(f"{folder}: {said}: check that the scratch volume has space and can be written") from error
