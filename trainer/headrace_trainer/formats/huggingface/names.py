"""The names and shapes of tensors in checkpoints and in Hugging Face folders, both ways.

Both rotate halves of a head, so rotary embeddings need no permutation. Shapes: H hidden size, G key-value heads, R query
heads per key-value head, D head width, F feed-forward width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from headrace_api.model import Architecture
from headrace_trainer.formats.model_card import ModelCard

LAYERS = "decoder.layers."
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
VOCABULARY = (EMBEDDING, OUTPUT)
"""Tensors with a row for each token; checkpoints pad them."""
_ATTENTION, _MLP = LAYERS + "self_attention.", LAYERS + "mlp."


@dataclass(frozen=True)
class Counterpart:
    """What a tensor of a checkpoint is made of.

    Attributes:
        names: of the tensors in a Hugging Face folder; those in a layer have ``{}`` where its number goes.
        join: makes the checkpoint's tensor of them.
        split: the reverse.
    """

    names: tuple[str, ...]
    join: Callable[[list[torch.Tensor]], torch.Tensor]
    split: Callable[[torch.Tensor], list[torch.Tensor]]

    def of_layer(self, layer: int) -> tuple[str, ...]:
        """The names of one layer."""
        return tuple(name.format(layer) for name in self.names)


def counterparts(arch: Architecture) -> dict[str, Counterpart]:
    """What each tensor of a checkpoint is called in a Hugging Face folder, by its name in the checkpoint.

    Checkpoints use Transformer Engine's fused names for norms, even if they were written without it.
    """
    found = {
        EMBEDDING: _same("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": _same("model.norm.weight"),
    }
    if not arch.tie_embeddings:
        found[OUTPUT] = _same("lm_head.weight")
    layer = {
        _ATTENTION + "linear_qkv.layer_norm_weight": _same("input_layernorm.weight"),
        _ATTENTION + "linear_qkv.weight": _grouped("weight", arch),
        _ATTENTION + "linear_proj.weight": _same("self_attn.o_proj.weight"),
        _MLP + "linear_fc1.layer_norm_weight": _same("post_attention_layernorm.weight"),
        _MLP + "linear_fc1.weight": _stacked("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        _MLP + "linear_fc2.weight": _same("mlp.down_proj.weight"),
    }
    if arch.has_qkv_bias:
        layer[_ATTENTION + "linear_qkv.bias"] = _grouped("bias", arch)
    if arch.has_qk_norm:
        layer[_ATTENTION + "q_layernorm.weight"] = _same("self_attn.q_norm.weight")
        layer[_ATTENTION + "k_layernorm.weight"] = _same("self_attn.k_norm.weight")
    return found | {key: _in_layers(part) for key, part in layer.items()}


def shapes(arch: Architecture, *, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a Hugging Face folder, by name."""
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    in_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.q_proj.bias": (queries,),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (arch.head_dim,),
        "self_attn.k_norm.weight": (arch.head_dim,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    outside = {
        "model.embed_tokens.weight": (vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab_size, hidden),
    }
    found: dict[str, tuple[int, ...]] = {}
    for part in counterparts(arch).values():
        for name in part.names:
            if name in outside:
                found[name] = outside[name]
            else:
                inside = in_layer[name.removeprefix(_IN_LAYER)]
                found |= {name.format(layer): inside for layer in range(arch.layers)}
    return found


def to_huggingface(weights: dict[str, torch.Tensor], card: ModelCard) -> dict[str, torch.Tensor]:
    """Rename and split whole tensors.

    Args:
        weights: by their names in the checkpoint, layers stacked.
        card: the dimensions, and the vocabulary size without padding.

    Returns:
        The state dict of the family's ``ForCausalLM``; without ``lm_head.weight`` if embeddings are tied.
    """
    named: dict[str, torch.Tensor] = {}
    for key, part in counterparts(card.architecture).items():
        for names, tensor in _by_layer(key, part, weights[key], card):
            named |= zip(names, part.split(tensor), strict=True)
    # Cloned, so that no tensor shares memory with a stack.
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}


def _by_layer(
    key: str, part: Counterpart, tensor: torch.Tensor, card: ModelCard
) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    if key.startswith(LAYERS):
        yield from ((part.of_layer(layer), tensor[layer]) for layer in range(card.architecture.layers))
    else:
        yield part.names, tensor[: card.vocab_size] if key in VOCABULARY else tensor


_IN_LAYER = "model.layers.{}."


def _in_layers(part: Counterpart) -> Counterpart:
    return Counterpart(tuple(_IN_LAYER + name for name in part.names), part.join, part.split)


def _same(name: str) -> Counterpart:
    return Counterpart((name,), lambda parts: parts[0], lambda tensor: [tensor])


def _stacked(*names: str) -> Counterpart:
    return Counterpart(names, torch.cat, lambda tensor: [*tensor.chunk(len(names))])


def _grouped(kind: str, arch: Architecture) -> Counterpart:
    """``[G (R + 2) D, ...]``: each key-value head follows its query heads."""
    groups, queries, width = arch.kv_heads, arch.heads // arch.kv_heads, arch.head_dim

    def join(parts: list[torch.Tensor]) -> torch.Tensor:
        cut = [part.reshape(groups, -1, width, *part.shape[1:]) for part in parts]
        return torch.cat(cut, dim=1).flatten(0, 2)

    def split(tensor: torch.Tensor) -> list[torch.Tensor]:
        cut = tensor.reshape(groups, queries + 2, width, *tensor.shape[1:])
        return [part.flatten(0, 2) for part in cut.split([queries, 1, 1], dim=1)]

    return Counterpart(tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv"), join, split)
