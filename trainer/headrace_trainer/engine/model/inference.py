"""A model that trains, made ready to draw tokens for as long as a block runs; then it is as it was.

Nothing here changes what is computed, but for fp8, whose kernels take no single position: it is off. Sequence parallelism is off
too, which cannot split one position. Attention takes masks and cached keys. And what Megatron does round the operations of a layer, which for one position costs more than the
operations, is left out: its layers are run by the few lines below, linears on one tensor rank by torch's.

Shapes: S positions of one pass, B sequences, H hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from headrace_trainer.engine.device.megatron import (
    ColumnParallelLinear,
    MegatronModule,
    RowParallelLinear,
    SelfAttention,
    StaticInferenceContext,
    TransformerLayer,
    parallel_state,
)
from headrace_trainer.engine.model.attention import CausalAttention

_SPLITS_SEQUENCE = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def ready_to_generate(model: MegatronModule) -> Iterator[None]:
    """Run the block with a model that draws tokens.

    Args:
        model: from ``build_model``, wrapped or not.
    """
    was_training, modules, fp8 = model.training, list(model.modules()), model.config.fp8
    holders = [model.config, *modules]
    splits = [(holder, name) for holder in holders for name in _SPLITS_SEQUENCE if getattr(holder, name, None) is True]
    attentions = [(layer, layer.core_attention) for layer in modules if isinstance(layer, SelfAttention)]
    thin = [(module, forward) for module in modules if (forward := _thin_forward(module)) is not None]
    model.eval()
    model.config.fp8 = None
    for holder, name in splits:
        setattr(holder, name, False)
    for layer, core in attentions:
        layer.core_attention = core if isinstance(core, CausalAttention) else _attention(layer)
    for module, forward in thin:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in thin:
            del module.forward  # the class's is seen again
        for layer, core in attentions:
            layer.core_attention = core
        for holder, name in splits:
            setattr(holder, name, True)
        model.config.fp8 = fp8
        model.train(was_training)


def _attention(layer: SelfAttention) -> CausalAttention:
    """For a layer whose own attention, Transformer Engine's, would pay no heed to a mask: there are no weights in it."""
    return CausalAttention(
        layer.config,
        attn_mask_type=layer.attn_mask_type,
        attention_type=layer.attention_type,
        attention_dropout=0.0,
        softmax_scale=layer.config.softmax_scale,
    )


def _thin_forward(module: torch.nn.Module) -> Callable[..., Any] | None:
    """A shorter way through a module, where there is one; subclasses may do more, and keep their own."""
    if type(module) is TransformerLayer:
        return partial(_layer, module)
    is_whole = parallel_state.get_tensor_model_parallel_world_size() == 1
    if is_whole and type(module) in (ColumnParallelLinear, RowParallelLinear) and not module.is_expert:
        return partial(_linear, module)
    return None


def _layer(
    layer: TransformerLayer,
    hidden_states: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None,
    rotary_pos_emb: torch.Tensor,
    inference_context: StaticInferenceContext,
    **_absent: Any,
) -> tuple[torch.Tensor, None]:
    """One layer: [S, B, H] -> [S, B, H], and no context of another sequence. Names are Megatron's."""
    attention, residual_SBH = layer.self_attention, hidden_states
    q, k, v = attention.get_query_key_value_tensors(layer.input_layernorm(residual_SBH), None)
    q, k, v, _, mask_type, _ = attention._adjust_key_value_for_inference(
        inference_context, q, k, v, (rotary_pos_emb, rotary_pos_emb)
    )
    mixed_SBH = attention.core_attention(q, k, v, attention_mask, attn_mask_type=mask_type)
    residual_SBH = _added(residual_SBH, *attention.linear_proj(mixed_SBH))
    return _added(residual_SBH, *layer.mlp(layer.pre_mlp_layernorm(residual_SBH))), None


def _added(residual_SBH: torch.Tensor, output_SBH: torch.Tensor, bias_H: torch.Tensor | None) -> torch.Tensor:
    return residual_SBH + (output_SBH if bias_H is None else output_SBH + bias_H)


def _linear(
    module: ColumnParallelLinear | RowParallelLinear,
    hidden_SBH: torch.Tensor,
    weight: torch.Tensor | None = None,
    runtime_gather_output: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A linear map whose weight is whole on this rank, and the bias that others are to add. Names are Megatron's."""
    bias = None if module.skip_bias_add else module.bias
    output = functional.linear(hidden_SBH, module.weight if weight is None else weight, bias)
    return output, module.bias if module.skip_bias_add else None
