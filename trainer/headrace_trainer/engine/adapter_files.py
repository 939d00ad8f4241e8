"""Adapters as files that PEFT loads onto the exported model: ``adapter_config.json`` and ``adapter_model.safetensors``.

In: a model with adapters, on a gang of any layout. Out: two files, written by rank 0. PEFT has the fused matrices apart:
``q_proj``, ``k_proj`` and ``v_proj`` get a copy of A each, and their rows of B; so do ``gate_proj`` and ``up_proj``.

Shapes: R rank, I inputs and O outputs of a whole matrix, G key-value heads, Q query heads for each of them, D width of a
head; L layers are stacked on the first axis.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from headrace_api.model import Architecture
from headrace_api.stages import Lora, LoraTarget
from headrace_trainer.engine.device.megatron import MegatronModule, is_main_replica
from headrace_trainer.engine.model.lora import PLACES, A, B
from headrace_trainer.engine.model.scalar_head import HEAD_KEY
from headrace_trainer.engine.model.start import shards
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.formats.model_card import ModelCard

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_MODULES = {
    LoraTarget.QKV: ("q_proj", "k_proj", "v_proj"),
    LoraTarget.PROJ: ("o_proj",),
    LoraTarget.FC1: ("gate_proj", "up_proj"),
    LoraTarget.FC2: ("down_proj",),
}
_BLOCKS = {"self_attention": "self_attn", "mlp": "mlp"}


def write_adapter(
    folder: Path, model: MegatronModule, *, lora: Lora, card: ModelCard, gang: Gang, with_vocabulary: bool
) -> None:
    """Write the adapters of a model. Every rank calls.

    Args:
        folder: where to; made.
        model: with its adapters, not yet merged.
        lora: the adapters' configuration.
        card: the model's dimensions.
        gang: this rank's place.
        with_vocabulary: whether the embedding and the output matrix go with them, as they must where the model's vocabulary
            is larger than that of the one that it was made from.
    """
    wanted = (A, B, HEAD_KEY) + ((_EMBEDDING, _OUTPUT) if with_vocabulary else ())
    tensors = _whole_tensors(model, gang, is_wanted=lambda key: key.endswith(wanted))
    if gang.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        named = {_PREFIX + name: tensor.contiguous() for name, tensor in _named(tensors, lora, card)}
        save_file(named, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        scores = HEAD_KEY in tensors
        (folder / CONFIG_FILE).write_text(json.dumps(_config(lora, scores=scores), indent=2))


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A box of a tensor."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    place: tuple[slice, ...]
    data: torch.Tensor


def _whole_tensors(model: MegatronModule, gang: Gang, *, is_wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """Whole tensors by their names in checkpoints, on rank 0; none on the others. Every rank calls."""
    pieces = [
        _Piece(
            key=shard.key,
            shape=shard.global_shape,
            place=tuple(slice(o, o + n) for o, n in zip(shard.global_offset, _sizes(shard), strict=True)),
            data=shard.data.detach().cpu().clone(),  # a view would be sent with all of its buffer
        )
        for shard in shards(model)
        if is_wanted(shard.key) and is_main_replica(shard.replica_id)
    ]
    found: list[Any] | None = [None] * gang.layout.world if gang.is_first else None
    dist.gather_object(pieces, found, group=gang.control)
    whole: dict[str, torch.Tensor] = {}
    for piece in (piece for pieces in found or [] for piece in pieces):
        if piece.key not in whole:
            whole[piece.key] = piece.data.new_empty(piece.shape)
        part = whole[piece.key][piece.place]
        part.copy_(piece.data.view(part.shape))
    return whole


def _sizes(shard: Any) -> tuple[int, ...]:
    """Layers are stacked: their number is an axis that the rank's tensor does not have."""
    return (1,) * shard.prepend_axis_num + tuple(shard.local_shape)


def _named(tensors: dict[str, torch.Tensor], lora: Lora, card: ModelCard) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under PEFT's names, without its prefix."""
    arch = card.architecture
    for target in lora.targets:
        place = PLACES[target]
        key = f"decoder.layers.{place.block}.{place.name}."
        for layer, (a_RI, b_OR) in enumerate(zip(tensors[key + A], tensors[key + B], strict=True)):
            for module, part_OR in zip(_MODULES[target], _parts(b_OR, target, arch), strict=True):
                name = f"model.layers.{layer}.{_BLOCKS[place.block]}.{module}"
                yield f"{name}.lora_A.weight", a_RI.clone()  # a file holds no tensor twice
                yield f"{name}.lora_B.weight", part_OR
    if HEAD_KEY in tensors:
        yield "score.weight", tensors[HEAD_KEY]
    if _EMBEDDING in tensors:
        yield "model.embed_tokens.weight", tensors[_EMBEDDING][: card.vocab_size]
    if _OUTPUT in tensors:
        yield "lm_head.weight", tensors[_OUTPUT][: card.vocab_size]


def _parts(b_OR: torch.Tensor, target: LoraTarget, arch: Architecture) -> list[torch.Tensor]:
    """B of a fused matrix, cut as the matrix is for transformers: each key-value head comes after its query heads."""
    if target is LoraTarget.FC1:
        return list(b_OR.chunk(2))
    if target is not LoraTarget.QKV:
        return [b_OR]
    queries, rank = arch.heads // arch.kv_heads, b_OR.size(1)
    parts_GPDR = b_OR.view(arch.kv_heads, queries + 2, arch.head_dim, rank)
    cuts = (slice(queries), slice(queries, queries + 1), slice(queries + 1, None))
    return [parts_GPDR[:, cut].reshape(-1, rank) for cut in cuts]


def _config(lora: Lora, *, scores: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scores else "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [module for target in lora.targets for module in _MODULES[target]],
        "modules_to_save": ["score"] if scores else None,
        "bias": "none",
        "inference_mode": True,
    }
