"""Patches to Megatron-core 0.16 and to checkpoint formats that every machine needs, with a GPU or without.

In: Megatron's modules, just imported. Out: the same modules with a few functions replaced. ``device.install`` calls it.
"""

import queue
from typing import Any

import megatron.core.optimizer
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.optimizer import distrib_optimizer
from megatron.core.transformer import torch_norm
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from headrace_trainer.engine.device.adam import FusedAdam


def install(*, transformer_engine: bool) -> None:
    """Replace what does not work as it came.

    Args:
        transformer_engine: whether Transformer Engine supplies the optimizer and the norms.
    """
    torch_dist.TorchDistLoadShardedStrategy.load_tensors_metadata = _tensors_metadata
    _write_portable_properties()
    _write_in_this_process()
    torch_norm.WrappedTorchNorm.__new__ = _norm
    if not transformer_engine:
        _use_fused_adam()


def _tensors_metadata(_strategy: object, folder: str, metadata: Any = None) -> dict[str, Any]:
    """Global shapes and dtypes of a checkpoint's tensors.

    The original hands every field of ``TensorProperties`` to ``torch.empty``; since torch 2.15 one of them is
    ``strides``, which ``torch.empty`` does not take.
    """
    metadata = metadata or torch_dist._get_filesystem_reader(folder).read_metadata()
    tensors = {k: m for k, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
    return {key: _without_data(key, entry) for key, entry in tensors.items()}


def _without_data(key: str, entry: TensorStorageMetadata) -> Any:
    empty = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    return torch_dist.ShardedTensor.from_rank_offsets(key, empty).without_data()


def _write_portable_properties() -> None:
    """Pickle five tensor properties, as torch did before 2.15: older versions refuse six, newer ones read both."""
    current = TensorProperties.__getstate__
    TensorProperties.__getstate__ = lambda self: current(self)[:5]  # type: ignore[method-assign, no-untyped-call]


def _write_in_this_process() -> None:
    """Write checkpoint files from the rank itself.

    The original forks writers and a manager that outlive a killed rank: they go on writing, and hold its output pipes
    open, so that whoever waits for the rank's end waits for ever.
    """
    results: queue.Queue[Any] = queue.Queue()
    filesystem_async._get_write_results_queue = lambda: results
    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_buckets)


def _write_buckets(transforms: list[Any], _msc: bool, _rank: int, buckets: list[Any], results: Any) -> None:
    """Write each bucket to its file and put ``{bucket: write results}``, or the first exception, on ``results``."""
    written: dict[int, Any] = {}
    for i, bucket in enumerate(buckets):
        local: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(i)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, i, bucket, local, pending, True)
        _, outcome = local.get()
        if isinstance(outcome, Exception):
            results.put(outcome)
            return
        written[i] = outcome
    results.put(written)


class ZeroCenteredNorm(torch.nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight, in fp32, as Transformer Engine's with a zero-centered gamma."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension."""
        return torch.nn.functional.rms_norm(
            x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps
        ).type_as(x)


def _norm(_cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> torch.nn.Module:
    """torch's norm for Megatron's local layers, with its weights marked for sequence parallelism.

    Unmarked, each tensor rank would train its norms on its own part of the sequence, and they would drift apart.
    """
    if config.layernorm_zero_centered_gamma:
        module: torch.nn.Module = ZeroCenteredNorm(hidden_size, eps=eps)
    else:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        module = kind(hidden_size, eps=eps)
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return module


def _use_fused_adam() -> None:
    optimizer: Any = megatron.core.optimizer
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
