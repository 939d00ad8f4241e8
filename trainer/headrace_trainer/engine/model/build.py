"""Architecture -> this rank's part of a Megatron model.

In: dimensions, a precision, the rank's place in the gang. Out: a ``LanguageModel`` whose weights are not set yet:
``start`` fills them, or a checkpoint does. ``engine.optimizer`` wraps it for training, ``evaluate`` uses it as it is.
"""

from enum import Enum, auto
from typing import Any

import torch

from headrace_api.model import Architecture, Family, padded_vocab
from headrace_api.parallelism import Layout
from headrace_api.stages.training import Fp8Recipe, Precision
from headrace_trainer.engine import device
from headrace_trainer.engine.device.megatron import (
    Float16Module,
    MegatronModule,
    ModuleSpec,
    TransformerConfig,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    tensor_parallel,
)
from headrace_trainer.engine.model.attention import CachingSelfAttention, CausalAttention
from headrace_trainer.engine.model.language_model import LanguageModel
from headrace_trainer.engine.model.rope import scaled_frequencies
from headrace_trainer.engine.model.scalar_head import ScalarHead
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.errors import UserError


class Head(Enum):
    """What the last stage says of each token."""

    LANGUAGE_MODEL = auto()
    """Logits of the next one."""
    SCALAR = auto()
    """One number: a reward, or a value."""


def build_model(
    architecture: Architecture,
    *,
    gang: Gang,
    vocab_size: int,
    sequence_length: int,
    precision: Precision,
    fp8_recipe: Fp8Recipe | None = None,
    head: Head = Head.LANGUAGE_MODEL,
) -> MegatronModule:
    """Build this rank's part of the model, on its device, in its precision; what is in its weights is undefined.

    Args:
        architecture: the dimensions.
        gang: the rank's place; process groups must exist.
        vocab_size: tokens, unpadded.
        sequence_length: tokens in a sample.
        precision: number format of the weights and matrix multiplications.
        fp8_recipe: where scales come from, if the precision is fp8; tensorwise if None.
        head: what the last stage gives; without labels, logits [B, S, V / tensor ranks] or numbers [B, S, 1].

    Raises:
        UserError: fp8 without a GPU and Transformer Engine.
    """
    check_precision(precision)
    config = transformer_config(
        architecture,
        layout=gang.layout,
        sequence_length=sequence_length,
        precision=precision,
        fp8_recipe=fp8_recipe or Fp8Recipe.TENSORWISE,
    )
    model = LanguageModel(
        config=config,
        transformer_layer_spec=_layer_spec(architecture),
        vocab_size=padded_vocab(vocab_size),
        real_vocab_size=vocab_size,
        embedding_scale=architecture.embedding_scale,
        max_sequence_length=sequence_length,
        position_embedding_type="rope",
        rotary_base=architecture.rope_base,
        share_embeddings_and_output_weights=architecture.tie_embeddings and head is Head.LANGUAGE_MODEL,
        pre_process=gang.is_first_stage,
        post_process=gang.is_last_stage,
    )
    if head is Head.SCALAR and gang.is_last_stage:
        model.output_layer = ScalarHead(config)
    if architecture.rope_scaling is not None:
        model.rotary_pos_emb.inv_freq = scaled_frequencies(model.rotary_pos_emb.inv_freq, architecture.rope_scaling)
    _mark_replicated_parameters(model)
    model = model.to(gang.device)
    return model if precision is Precision.FP32 else Float16Module(config, model)


def check_precision(precision: Precision) -> None:
    """Refuse fp8 where no hardware or no kernels can do it."""
    if precision is Precision.FP8 and not device.has_transformer_engine():
        found = "a GPU without Transformer Engine" if device.has_cuda() else "no GPU"
        raise UserError(f"precision: 'fp8': found {found}: use bf16, or an image and a node pool that can do fp8")


def transformer_config(
    architecture: Architecture, *, layout: Layout, sequence_length: int, precision: Precision, fp8_recipe: Fp8Recipe
) -> TransformerConfig:
    """Megatron's configuration of a model.

    Megatron's own initialization stays on and is given nothing to do: it is what marks the matrices as split over
    tensor ranks, and without the marks gradient norms leave out all ranks but the first.
    """
    return TransformerConfig(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_heads,
        kv_channels=architecture.head_dim,
        add_qkv_bias=architecture.has_qkv_bias,
        qk_layernorm=architecture.has_qk_norm,
        ffn_hidden_size=architecture.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func=_ACTIVATIONS.get(architecture.family, torch.nn.functional.silu),
        layernorm_zero_centered_gamma=architecture.family is Family.GEMMA,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        # Tensor ranks split the activations between matrices too, where the sequence can be split.
        sequence_parallel=layout.tensor > 1 and sequence_length % layout.tensor == 0,
        init_method=_leave,
        output_layer_init_method=_leave,
        calculate_per_token_loss=True,
        deterministic_mode=True,
        attention_softmax_in_fp32=True,
        **_formats(precision, fp8_recipe),
        **_fusions(architecture),
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _formats(precision: Precision, fp8_recipe: Fp8Recipe) -> dict[str, Any]:
    if precision is Precision.FP32:
        return {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    formats: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    if precision is Precision.FP8:
        formats |= {"fp8": "hybrid", "fp8_recipe": fp8_recipe.value}
    if precision is Precision.FP8 and fp8_recipe is Fp8Recipe.DELAYED:
        # Megatron's defaults look at the last step alone, and one spike would overflow the next.
        formats |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return formats


def _gelu(gate: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form."""
    return torch.nn.functional.gelu(gate, approximate="tanh")


_ACTIVATIONS = {Family.GEMMA: _gelu}


def _fusions(architecture: Architecture) -> dict[str, bool]:
    """Fused kernels: Transformer Engine brings its own; Apex's are never taken."""
    fused = device.has_transformer_engine()
    return {
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": fused,
        # Megatron knows the activations of its fused kernels by their functions, and the tanh form of GELU has none.
        "bias_activation_fusion": fused and architecture.family not in _ACTIVATIONS,
        "apply_rope_fusion": fused,
    }


def _layer_spec(architecture: Architecture) -> ModuleSpec:
    if device.has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=architecture.has_qk_norm)
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=architecture.has_qk_norm)
        spec.submodules.self_attention.submodules.core_attention = CausalAttention
    spec.submodules.self_attention.module = CachingSelfAttention
    return spec


def _mark_replicated_parameters(model: torch.nn.Module) -> None:
    """torch's norms say nothing of tensor parallelism; gradient norms count each replicated weight once if they do."""
    for parameter in model.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
