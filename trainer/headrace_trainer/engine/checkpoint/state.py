"""Model and optimizer <-> a folder of ``torch_dist`` files, by Megatron's distributed checkpointing.

In: this rank's part of a model and its optimizer. Out: a folder from which any other layout loads. Every rank calls;
each writes ``__<rank>_*.distcp`` into its own folder of that name, rank 0 also ``common.pt`` and, once all have written,
``.metadata`` and ``metadata.json``. ``checkpointer`` commits the folder.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from headrace_trainer.engine.checkpoint.files import CheckpointFiles, Corrupt
from headrace_trainer.engine.checkpoint.optimizer_state import large_tensors, sharded_moments
from headrace_trainer.engine.checkpoint.reading import FetchingLoadStrategy
from headrace_trainer.engine.checkpoint.staging import Staging
from headrace_trainer.engine.device import has_cuda
from headrace_trainer.engine.device.megatron import (
    CheckpointingConfig,
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
    MegatronModule,
    MegatronOptimizer,
    ShardedTensor,
    StrictHandling,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    apply_factories,
    dist_checkpointing,
    get_attr_wrapped_model,
    get_default_load_sharded_strategy,
    nested_values,
    parallel_state,
    save_config,
    save_preprocess,
)
from headrace_trainer.errors import StorageError

_REMEDY = "check that the scratch volume has space and can be written"
_MODEL_FORM = {
    # The gate and up matrices of SwiGLU are parts of one tensor, wherever tensor parallelism cuts them.
    "singleton_local_shards": False,
}


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What training changes: frozen weights are no part of it, the stage gets them where it got them at first."""

    model: MegatronModule
    """This rank's part, without the wrapper for training."""
    optimizer: MegatronOptimizer


COMMITTING_FILES = (".metadata", "metadata.json")
"""What rank 0 writes once every rank has written."""
COMMON_FILE = "common.pt"
SHARED_FILES = (*COMMITTING_FILES, COMMON_FILE)
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
        self._base = _SaveStrategy("torch_dist", 1, thread_count=1, cached_metadata=True)
        self._strategy = FullyParallelSaveStrategyWrapper(self._base, _replicas(), True)
        self._staging = Staging()
        self._is_first = True

    def begin(self, folder: Path) -> "Write":
        """Take the state as it is now. Every rank calls; nothing is written yet.

        Args:
            folder: an empty folder, local to the node.
        """
        state = _uncopied(_sharded(self._state)) | {"content_metadata": _MODEL_FORM}
        sharded, common = save_preprocess(state, validate_access_integrity=self._is_first)
        request = self._strategy.async_save(sharded, folder)
        self._is_first = False
        return Write(
            request,
            folder,
            common=common,
            writer=self._base.writer,
            metadata=self._base.metadata,
            staging=self._staging,
            state=list(large_tensors(self._state.optimizer)),
        )


class _SaveStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Notes what ends a save: Megatron would do that while training waits, and let one rank alone know what went wrong.

    Attributes:
        writer: Megatron's, of the newest save.
        metadata: what its files will hold, on rank 0.
    """

    writer: Any = None
    metadata: Any = None

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> Any:
        self.writer, self.metadata, _ = planned
        return super()._get_save_and_finalize_callbacks(writer, planned)


class Write:
    """A state that is to be written, as it was.

    Attributes:
        state: large tensors of which forks need nothing.

    Args:
        request: Megatron's: a function that writes buckets of tensors.
        folder: where to.
        common: what is the same on every rank.
        writer: Megatron's, which writes what names the files.
        metadata: what that will be, on rank 0.
        staging: for a copy of what lies in the host's memory.
        state: see above.
    """

    def __init__(
        self,
        request: Any,
        folder: Path,
        *,
        common: dict[str, Any],
        writer: Any,
        metadata: Any,
        staging: Staging,
        state: list[torch.Tensor],
    ) -> None:
        self._request, self._folder, self._common = request, folder, common
        self._writer, self._metadata = writer, metadata
        self.state = state
        # Tensors of a GPU are copied here, into pinned memory.
        buckets = request.preload_fn() if request.preload_fn is not None else []
        self._buckets = buckets if has_cuda() else _staged(buckets, staging)

    def write(self) -> list[Any]:
        """Write this rank's file, and on rank 0 what all ranks share. May be called in a fork of the rank.

        Returns:
            What ``finish`` wants to know of it.

        Raises:
            StorageError: the folder cannot be written.
        """
        rank = torch.distributed.get_rank()
        with _disk_errors(self._folder, rank):
            if rank == 0:
                torch.save(self._common, self._folder / COMMON_FILE)
            if self._request.async_fn is None:
                return []
            _, _, results = self._request.async_fn_args
            self._request.async_fn(rank, self._buckets, results, **self._request.async_fn_kwargs)
            outcome = results.get_nowait()
            if isinstance(outcome, Exception):
                raise outcome
        return [result for bucket in outcome.values() for result in bucket]

    def let_go(self) -> None:
        """Forget the tensors, once a fork has them."""
        self._buckets = []

    def finish(self, written: list[list[Any]]) -> None:
        """Write what makes the folder a checkpoint, on rank 0. May be called in a fork of it.

        Args:
            written: what ``write`` returned, by rank.

        Raises:
            StorageError: the folder cannot be written.
        """
        with _disk_errors(self._folder, 0):
            self._writer.finish(self._metadata, written)
            save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))


def _staged(buckets: list[Any], staging: Staging) -> list[Any]:
    """Buckets of Megatron's writer, with copies of their tensors."""
    copies = iter(staging.hold([tensor for _, _, (_, tensors) in buckets for _, tensor in tensors]))
    return [
        (path, key, (texts, [(item, next(copies)) for item, _ in tensors])) for path, key, (texts, tensors) in buckets
    ]


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
        load_partly(state.model, loaded["model"], lacking=_frozen_names(state.model))
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


def load_partly(model: MegatronModule, state: Mapping[str, Any], *, lacking: Collection[str]) -> None:
    """Set the weights that ``state`` has. It must have all but those that are named, and no others.

    Args:
        model: not wrapped for training.
        state: name -> tensor.
        lacking: names of weights that stay as they are.
    """
    module = get_attr_wrapped_model(model, "pre_process", return_model_obj=True)
    found = module.load_state_dict(state, strict=False)
    wrong = [*found.unexpected_keys, *(set(found.missing_keys) - set(lacking))]
    assert not wrong, wrong


def _frozen_names(model: MegatronModule) -> set[str]:
    module = get_attr_wrapped_model(model, "pre_process", return_model_obj=True)
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


def _sharded(state: TrainState) -> dict[str, Any]:
    sharded = _sharded_model(state.model)
    model = {name: entry for name, entry in sharded.items() if not _is_frozen(getattr(entry, "data", None))}
    return {
        "model": model,
        "moments": sharded_moments(state.optimizer, model),
        "optimizer": state.optimizer.state_dict(),
    }


def _uncopied(sharded: dict[str, Any]) -> dict[str, Any]:
    """The same memory, with a storage for each tensor.

    Weights and moments are parts of large buffers. On a CPU Megatron copies each part of a storage into new memory, which is
    slow to come by, and so nearly the whole state while training waits.
    """
    apply_factories(sharded)
    for entry in nested_values(sharded):
        if isinstance(entry, ShardedTensor) and entry.data.device.type == "cpu":
            entry.data = torch.from_dlpack(entry.data.detach())
    return sharded


def _is_frozen(data: object) -> bool:
    return isinstance(data, torch.nn.Parameter) and not data.requires_grad


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
        raise StorageError(f"{folder}: {said}: {_REMEDY}") from error


@contextmanager
def _disk_errors(folder: Path, rank: int) -> Iterator[None]:
    """torch reports a full disk by RuntimeError too."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{folder}: rank {rank}: {error}: {_REMEDY}") from error
