"""Start weights that do not depend on the layout.

Each tensor is drawn whole from a generator seeded with (seed, its name in checkpoints, its layer), and each rank keeps
its own part. So one rank, tensor ranks and pipeline stages all begin with the same model, and a test can compare them.
"""

import hashlib
import math
from collections.abc import Iterator

import torch

from headrace_api.model import Architecture
from headrace_trainer.engine.device.megatron import MegatronModule, ShardedTensor, apply_factories, nested_values

_RESIDUAL_OUTPUTS = ("linear_proj", "linear_fc2")


@torch.no_grad()
def fill_start_weights(model: MegatronModule, architecture: Architecture, *, seed: int) -> None:
    """Fill every parameter of ``model`` in place.

    Norms start at 1, matrices are normal with ``init_std``; those that write to the residual stream are scaled down by
    the root of twice the number of layers (GPT-2, section 2.3 of its report).
    """
    for shard in _shards(model):
        part = _part(_whole(shard, architecture, seed=seed), shard)
        shard.data.copy_(part.reshape(shard.data.shape))


def _shards(model: MegatronModule) -> Iterator[ShardedTensor]:
    state = model.sharded_state_dict()
    # Fused matrices become their pieces, whose .data are views of the parameter.
    apply_factories(state)
    return (t for t in nested_values(state) if isinstance(t, ShardedTensor) and t.data is not None)


def _whole(shard: ShardedTensor, architecture: Architecture, *, seed: int) -> torch.Tensor:
    layer, shape = shard.global_offset[: shard.prepend_axis_num], shard.global_shape[shard.prepend_axis_num :]
    if "norm" in shard.key:
        return torch.ones(shape)
    std = architecture.init_std
    if any(name in shard.key for name in _RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * architecture.layers)
    return std * torch.randn(shape, generator=_generator(seed, shard.key, layer))


def _generator(seed: int, key: str, layer: tuple[int, ...]) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {key} {list(layer)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _part(whole: torch.Tensor, shard: ShardedTensor) -> torch.Tensor:
    offsets = shard.global_offset[shard.prepend_axis_num :]
    lengths = shard.local_shape[-len(offsets) :]
    return whole[tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))]
