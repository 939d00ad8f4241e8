"""Start weights that do not depend on the layout.

Each matrix is a grid of tiles, and each tile is a stretch of a counter-based generator (Philox) of its own: the key is
made of the seed, the matrix's name in checkpoints and its layer, the counter starts at the tile's number. A rank draws
the tiles that its part touches and keeps what is its own; so one rank, tensor ranks and pipeline stages all begin with
the same model, and none ever holds a whole matrix.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch

from headrace_api.model import Architecture, Family
from headrace_trainer.engine.device.megatron import MegatronModule, ShardedTensor, apply_factories, nested_values
from headrace_trainer.engine.model.scalar_head import HEAD_KEY, head_std

_RESIDUAL_OUTPUTS = ("linear_proj", "linear_fc2")
_TILE_ROWS, _TILE_COLUMNS = 256, 512
_KEY_BYTES = 16


@torch.no_grad()
def fill_start_weights(model: MegatronModule, architecture: Architecture, *, seed: int) -> None:
    """Fill every parameter of ``model`` in place.

    Norms start at a factor of 1, biases at 0, matrices are normal with ``init_std``; those that write to the residual stream
    are scaled down by the root of twice the number of layers (GPT-2, section 2.3 of its report). A scalar head has a width
    of its own.
    """
    for shard in shards(model):
        if "norm" in shard.key:
            shard.data.fill_(0.0 if architecture.family is Family.GEMMA else 1.0)
        elif shard.key.endswith(".bias"):
            shard.data.zero_()
        else:
            part = draw(shard, seed=seed).mul_(_std(shard.key, architecture))
            shard.data.copy_(part.reshape(shard.data.shape))


def shards(model: MegatronModule) -> Iterator[ShardedTensor]:
    """This rank's part of each tensor of a model, with its place in the whole; ``data`` is a view of the parameter."""
    state = model.sharded_state_dict()
    # Fused matrices become their pieces, whose .data are views of the parameter.
    apply_factories(state)
    return (t for t in nested_values(state) if isinstance(t, ShardedTensor) and t.data is not None)


def _std(key: str, architecture: Architecture) -> float:
    if key == HEAD_KEY:
        return head_std(architecture.hidden_size)
    if any(name in key for name in _RESIDUAL_OUTPUTS):
        return architecture.init_std / math.sqrt(2 * architecture.layers)
    return architecture.init_std


def draw(shard: ShardedTensor, *, seed: int) -> torch.Tensor:
    """This rank's part of a matrix of standard normal numbers, in fp32 on the CPU."""
    layer, (num_rows, num_columns) = shard.global_offset[:-2], shard.global_shape[-2:]
    first_row, first_column = shard.global_offset[-2:]
    part, key = torch.empty(shard.local_shape[-2:]), _matrix_key(seed, shard.key, layer)
    for i, rows, tile_rows in _tiles(first_row, part.size(0), side=_TILE_ROWS):
        for j, columns, tile_columns in _tiles(first_column, part.size(1), side=_TILE_COLUMNS):
            generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, i, j]))
            # Tiles at the edge end with the matrix.
            shape = min(_TILE_ROWS, num_rows - i * _TILE_ROWS), min(_TILE_COLUMNS, num_columns - j * _TILE_COLUMNS)
            drawn = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
            part[rows, columns] = drawn[tile_rows, tile_columns]
    return part


def _matrix_key(seed: int, key: str, layer: tuple[int, ...]) -> int:
    digest = hashlib.sha256(f"{seed} {key} {list(layer)}".encode()).digest()
    return int.from_bytes(digest[:_KEY_BYTES], "big")


def _tiles(first: int, length: int, *, side: int) -> Iterator[tuple[int, slice, slice]]:
    """The tiles along one axis that ``first`` to ``first + length - 1`` touch: number, place in the part, part of it."""
    for tile in range(first // side, -(-(first + length) // side)):
        begin, end = max(first, tile * side), min(first + length, (tile + 1) * side)
        yield tile, slice(begin - first, end - first), slice(begin - tile * side, end - tile * side)
