"""The optimizer's state as boxes of the model's tensors: written without a gather, read under any layout.

Megatron's distributed optimizer gives each replica a run of elements of the flattened weights, which may begin and end
inside a tensor. A run of a row-major tensor is a handful of boxes (the rest of a row, whole rows, the beginning of a row), and
a box of a global tensor is what ``torch_dist`` stores. So each rank writes views of its own moments, and a rank of another
layout reads the boxes that overlap its own.

Megatron's own forms either gather the state of all replicas on each of them (``fully_reshardable``) or store the
flattened buffer, which only the same tensor x pipeline layout reads (``dp_reshardable``). The keys here are those of the former.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from headrace_trainer.engine.device.megatron import (
    MegatronOptimizer,
    ShardedTensor,
    ShardedTensorFactory,
    nested_values,
)

_NAMES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box of a tensor whose elements follow each other in memory."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Elements ``[start, stop)`` of a row-major tensor, as boxes in the order of their elements."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [Box(offsets=(start,), sizes=(stop - start,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        return _in_row(shape, first - 1, start, stop)
    found = _in_row(shape, first - 1, start, first * row)
    if first < last:
        found.append(Box(offsets=(first, *(0 for _ in shape[1:])), sizes=(last - first, *shape[1:])))
    return found + _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> list[Box]:
    """Elements of one row, given by their place in the whole tensor."""
    skip = index * math.prod(shape[1:])
    inner = boxes(shape[1:], start - skip, stop - skip)
    return [Box(offsets=(index, *b.offsets), sizes=(1, *b.sizes)) for b in inner]


def sharded_moments(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, ShardedTensor]:
    """This rank's fp32 weights and moments, as views: saving reads them, loading writes into them.

    Args:
        optimizer: distributed AdamW.
        model: the sharded state dict of its model.
    """
    weights = {id(entry.data): entry for entry in nested_values(model)}
    found = {}
    for part in optimizer.chained_optimizers:
        for weight, start, stop in _runs(part):
            tensors = part._get_main_param_and_optimizer_states(weight)
            for name in _NAMES:
                # Before the first update there are no moments.
                state_E = tensors[name] if name in tensors else torch.zeros_like(tensors["param"])
                for piece in _pieces(weights[id(weight)], name, state_E.detach(), start=start, stop=stop):
                    found[f"{piece.key}.{piece.global_offset}"] = piece
    return found


def large_tensors(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """Weights, gradients and moments of this rank: nearly all the memory that it has for long."""
    for part in optimizer.chained_optimizers:
        for buffer in part.buffers:
            yield from (data for data in (buffer.param_data, buffer.grad_data) if data is not None)
        for weight, _, _ in _runs(part):
            yield from part._get_main_param_and_optimizer_states(weight).values()


def _runs(part: Any) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Each weight of which this replica owns elements, and which: [start, stop) of the flattened weight."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for weight, ranges in bucket["param_map"].items():
                    yield weight, ranges["param"].start, ranges["param"].end


def _pieces(
    entry: ShardedTensor | ShardedTensorFactory, name: str, state_E: torch.Tensor, *, start: int, stop: int
) -> Iterator[ShardedTensor]:
    """The boxes of elements [start, stop) of a weight, E of them, each with its view of ``state_E``."""
    for tensor in _tensors(entry):
        first = tensor.data.storage_offset()
        begin, end = max(start, first), min(stop, first + tensor.data.numel())
        for box in boxes(tuple(tensor.data.shape), begin - first, end - first):
            length = math.prod(box.sizes)
            # Layers are stacked: their number is an axis that the weight itself does not have.
            sizes, offsets = (1,) * tensor.prepend_axis_num + box.sizes, (0,) * tensor.prepend_axis_num + box.offsets
            yield ShardedTensor(
                key=f"optimizer.state.{name}.{tensor.key}",
                data=state_E[begin - start : begin - start + length].view(sizes),
                dtype=state_E.dtype,
                local_shape=sizes,
                global_shape=tensor.global_shape,
                global_offset=tuple(a + b for a, b in zip(tensor.global_offset, offsets, strict=True)),
                axis_fragmentations=None,  # not a grid
                # Each replica owns elements of its own: only copies on other pipeline and tensor ranks are replicas.
                replica_id=(*tensor.replica_id[:2], 0),
            )
            begin += length


def _tensors(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """What a weight is stored as: itself, or the gate and up matrices of SwiGLU. Their data is empty, but has offsets."""
    empty = torch.empty(entry.data.shape, dtype=entry.data.dtype, device="meta")
    if isinstance(entry, ShardedTensor):
        return [replace(entry, data=empty)]
    return list(nested_values(replace(entry, data=empty).build()))
