"""A Hugging Face folder -> a model on any layout.

Each tensor of a checkpoint is made of one to three tensors of the folder, and this rank keeps its part of it: no rank ever
holds more than one of them whole.
"""

import torch

from headrace_trainer.engine.device.megatron import MegatronModule, ShardedTensor
from headrace_trainer.engine.model.start import shards
from headrace_trainer.formats.huggingface.files import PretrainedFolder
from headrace_trainer.formats.huggingface.names import LAYERS, VOCABULARY, counterparts


@torch.no_grad()
def load_pretrained(model: MegatronModule, source: PretrainedFolder) -> None:
    """Read the weights into a model. What the folder does not have stays as it is: a new head, rows of new tokens.

    Args:
        model: from ``build_model`` with the folder's architecture, not wrapped for training.
        source: the folder.
    """
    parts = counterparts(source.architecture)
    for shard in shards(model):
        if shard.key not in parts:
            continue
        layer, place = _place(shard)
        names = parts[shard.key].of_layer(layer) if shard.key.startswith(LAYERS) else parts[shard.key].names
        if shard.key in VOCABULARY:
            rows, columns = place
            place = slice(rows.start, min(rows.stop, source.vocab_size)), columns
            if place[0].start >= place[0].stop:
                continue  # this rank has padding alone
        if len(names) == 1:
            part = source.part(names[0], place)
        else:
            part = parts[shard.key].join([source.tensor(name) for name in names])[place]
        target = shard.data.view(shard.local_shape)
        target[tuple(slice(0, size) for size in part.shape)].copy_(part)


def _place(shard: ShardedTensor) -> tuple[int, tuple[slice, ...]]:
    """The layer, where the tensor is one of a stack, and the part of the tensor that this rank holds."""
    stacked = shard.prepend_axis_num
    layer = shard.global_offset[0] if stacked else 0
    offsets = shard.global_offset[stacked:]
    return layer, tuple(slice(o, o + n) for o, n in zip(offsets, shard.local_shape[-len(offsets) :], strict=True))
