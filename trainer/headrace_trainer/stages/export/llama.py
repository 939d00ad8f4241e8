"""Map Megatron's names and shapes to those of transformers' Llama.

Both rotate halves of a head, so rotary embeddings need no permutation. Shapes: H = hidden size, G = key-value heads,
R = query heads per key-value head, D = head width, F = feed-forward width, V = vocabulary, L = layers.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig

from headrace_api.model import Architecture
from headrace_trainer.formats.model_card import ModelCard

Named = tuple[str, torch.Tensor]

_LAYER = "decoder.layers."
_ATTENTION = _LAYER + "self_attention."


def to_llama(weights: dict[str, torch.Tensor], card: ModelCard) -> dict[str, torch.Tensor]:
    """Rename and split whole tensors.

    Args:
        weights: by their names in the checkpoint, layers stacked.
        card: the dimensions, and the vocabulary size without padding.

    Returns:
        The state dict of a ``LlamaForCausalLM``; without ``lm_head.weight`` if embeddings are tied.
    """
    arch, vocab = card.architecture, card.vocab_size
    named = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:vocab],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    if not arch.tie_embeddings:
        named["lm_head.weight"] = weights["output_layer.weight"][:vocab]
    for layer in range(arch.layers):
        for name, tensor in _layer({k: v[layer] for k, v in weights.items() if k.startswith(_LAYER)}, arch):
            named[f"model.layers.{layer}.{name}"] = tensor
    # Cloned, so that no tensor shares memory with a stack.
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}


def _layer(weights: dict[str, torch.Tensor], arch: Architecture) -> Iterator[Named]:
    yield from _attention(weights[_ATTENTION + "linear_qkv.weight"], arch)
    yield "self_attn.o_proj.weight", weights[_ATTENTION + "linear_proj.weight"]
    gate, up = weights[_LAYER + "mlp.linear_fc1.weight"].chunk(2)
    yield "mlp.gate_proj.weight", gate
    yield "mlp.up_proj.weight", up
    yield "mlp.down_proj.weight", weights[_LAYER + "mlp.linear_fc2.weight"]
    # The checkpoint uses Transformer Engine's fused names, even if it was written without it.
    yield "input_layernorm.weight", weights[_ATTENTION + "linear_qkv.layer_norm_weight"]
    yield "post_attention_layernorm.weight", weights[_LAYER + "mlp.linear_fc1.layer_norm_weight"]


def _attention(qkv: torch.Tensor, arch: Architecture) -> Iterator[Named]:
    """``[G (R + 2) D, H]``: each key-value head follows its query heads."""
    groups, queries = arch.kv_heads, arch.heads // arch.kv_heads
    parts_GPDH = qkv.view(groups, queries + 2, arch.head_dim, arch.hidden_size)
    yield "self_attn.q_proj.weight", parts_GPDH[:, :queries].reshape(-1, arch.hidden_size)
    yield "self_attn.k_proj.weight", parts_GPDH[:, queries].reshape(-1, arch.hidden_size)
    yield "self_attn.v_proj.weight", parts_GPDH[:, queries + 1].reshape(-1, arch.hidden_size)


def llama_config(card: ModelCard, *, dtype: str) -> LlamaConfig:
    """The configuration from which transformers and vLLM build the model."""
    arch = card.architecture
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": arch.rope_base}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=card.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.ffn_hidden_size,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        max_position_embeddings=card.sequence_length,
        rms_norm_eps=arch.norm_epsilon,
        initializer_range=arch.init_std,
        rope_parameters=rope,
        tie_word_embeddings=arch.tie_embeddings,
        bos_token_id=card.eod_id,
        eos_token_id=card.eod_id,
        dtype=dtype,
    )
