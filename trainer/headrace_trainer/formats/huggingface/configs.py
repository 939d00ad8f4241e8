"""``config.json`` <-> an ``Architecture``.

In: what ``config.json`` says of a model that was trained elsewhere, or a trained model's card. Out: its architecture, with
what cannot be trained here refused by name, or the configuration from which transformers and vLLM build the model.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace_api.model import Architecture, Family, RopeKind, RopeScaling
from headrace_trainer.errors import UserError
from headrace_trainer.formats.model_card import ModelCard

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_CLASSES = {
    Family.LLAMA: "LlamaForCausalLM",
    Family.MISTRAL: "MistralForCausalLM",
    Family.QWEN2: "Qwen2ForCausalLM",
    Family.QWEN3: "Qwen3ForCausalLM",
    Family.GEMMA: "GemmaForCausalLM",
}
_KINDS = f"{', '.join(f.value for f in list(Family)[:-1])} or {list(Family)[-1].value}"
_OTHER = f"start from a model that has none: {_KINDS}"
_GELU = "gelu_pytorch_tanh"
_ACTIVATIONS = {Family.GEMMA: _GELU}
_DEFAULT_ACTIVATION = "silu"


def architecture_from(raw: dict[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` describes.

    Args:
        raw: its content.

    Raises:
        UserError: a part of it is not done here; named, with a remedy.
    """
    for field, remedy in _foreign_parts(raw):
        raise UserError(f"config.json: {field}: {raw.get(field)!r}: {remedy}")
    family, config = Family(raw["model_type"]), _complete(raw)
    for field, remedy in _foreign_values(family, config):
        raise UserError(f"config.json: {field}: {getattr(config, field, None)!r}: {remedy}")
    try:
        return _architecture(family, config)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"config.json: {error}; copy or export it again") from error


def _architecture(family: Family, config: Any) -> Architecture:
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    return Architecture(
        layers=config.num_hidden_layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        ffn_hidden_size=config.intermediate_size,
        rope_base=config.rope_parameters["rope_theta"],
        norm_epsilon=config.rms_norm_eps,
        init_std=config.initializer_range or Architecture.model_fields["init_std"].default,
        tie_embeddings=config.tie_word_embeddings,
        family=family,
        head_width=head_dim if head_dim * heads != hidden else None,
        rope_scaling=_rope_scaling(config.rope_parameters),
        window=config.sliding_window if family is Family.MISTRAL else None,
    )


def _foreign_parts(raw: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields that say that a model is another kind of model, before transformers looks at them."""
    if raw.get("model_type") not in [*Family]:
        yield "model_type", f"is not trained here: start from a model of the type {_KINDS}"
    for field in ("num_experts", "num_local_experts", "n_routed_experts"):
        if raw.get(field):
            yield field, f"mixtures of experts are not trained here: {_OTHER}"
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if raw.get(field):
            yield field, f"capped logits are not done here: {_OTHER}"
    if raw.get("quantization_config"):
        yield "quantization_config", "quantized weights cannot be trained: start from the bf16, fp16 or fp32 weights"


def _foreign_values(family: Family, config: Any) -> Iterator[tuple[str, str]]:
    wanted = _ACTIVATIONS.get(family, _DEFAULT_ACTIVATION)
    if config.hidden_act != wanted:
        yield "hidden_act", f"a {family.value} model's is {wanted} here: start from a model that uses it"
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field, False):
            yield field, f"these biases are not done here: {_OTHER}"
    if getattr(config, "attention_dropout", 0):
        yield "attention_dropout", "dropout is not done here: set it to 0 in config.json"
    if getattr(config, "use_sliding_window", False) and "sliding_attention" in config.layer_types:
        yield "use_sliding_window", "sliding windows are not done here: set it to false, or start from another model"
    if getattr(config, "use_bidirectional_attention", None):
        yield "use_bidirectional_attention", f"attention to later tokens is not done here: {_OTHER}"
    if config.rope_parameters.get("rope_type", "default") not in ("default", *RopeKind):
        yield "rope_parameters", "only the types default, linear and llama3 are done here: start from a model with one"
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        yield "rope_parameters", f"rotating a part of each head is not done here: {_OTHER}"
    if config.num_key_value_heads < 1 or config.num_attention_heads % config.num_key_value_heads:
        yield (
            "num_key_value_heads",
            f"must divide num_attention_heads, {config.num_attention_heads}; correct config.json",
        )


def _complete(raw: dict[str, Any]) -> Any:
    """The configuration with the defaults that transformers has for what is left out."""
    from transformers import AutoConfig

    fields = {k: v for k, v in raw.items() if k != "model_type"}
    try:
        return AutoConfig.for_model(raw["model_type"], **fields)
    except Exception as error:  # the library raises many kinds
        raise UserError(f"config.json: transformers cannot read it: {error}; copy or export it again") from error


def _rope_scaling(found: dict[str, Any]) -> RopeScaling | None:
    kind = found.get("rope_type", "default")
    if kind == RopeKind.LINEAR:
        return RopeScaling(kind=RopeKind.LINEAR, factor=found["factor"])
    if kind == RopeKind.LLAMA3:
        return RopeScaling(
            kind=RopeKind.LLAMA3,
            factor=found["factor"],
            low_frequency_factor=found["low_freq_factor"],
            high_frequency_factor=found["high_freq_factor"],
            original_context=found["original_max_position_embeddings"],
        )
    return None


def huggingface_config(card: ModelCard, *, dtype: str) -> "PreTrainedConfig":
    """The configuration from which transformers and vLLM build the model.

    Args:
        card: of the model.
        dtype: of the weights, as torch calls it.
    """
    from transformers import AutoConfig

    arch = card.architecture
    own: dict[str, Any] = {}
    if arch.family is Family.MISTRAL:
        own["sliding_window"] = arch.window
    if arch.family is not Family.QWEN2:
        own["head_dim"] = arch.head_dim
    return AutoConfig.for_model(
        arch.family.value,
        architectures=[_CLASSES[arch.family]],
        vocab_size=card.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.ffn_hidden_size,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_heads,
        hidden_act=_ACTIVATIONS.get(arch.family, _DEFAULT_ACTIVATION),
        max_position_embeddings=max(card.context or 0, card.sequence_length),
        rms_norm_eps=arch.norm_epsilon,
        initializer_range=arch.init_std,
        rope_parameters=_rope_parameters(arch),
        tie_word_embeddings=arch.tie_embeddings,
        bos_token_id=card.first_id,
        eos_token_id=card.eod_id,
        dtype=dtype,
        **own,
    )


def _rope_parameters(arch: Architecture) -> dict[str, Any]:
    scaling, base = arch.rope_scaling, {"rope_theta": arch.rope_base}
    if scaling is None:
        return {"rope_type": "default", **base}
    named = {"rope_type": scaling.kind.value, "factor": scaling.factor, **base}
    if scaling.kind is RopeKind.LINEAR:
        return named
    return named | {
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_context,
    }
