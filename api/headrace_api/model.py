"""Architectures: dimensions, presets, and parameter counts of Llama and of the families that differ from it in details.

In: a stage's ``model`` block. Out: an ``Architecture`` with every dimension filled in, for ``planning`` and the
trainer's ``model``.
"""

import math
from collections.abc import Collection
from enum import StrEnum
from typing import Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from headrace_api.base import FieldError, Part, Spec, api_rules, rule

VOCAB_MULTIPLE = 1024
"""Every layout pads the vocabulary to a multiple of this: 128 for each of up to 8 tensor ranks. The width is the same
for all layouts, so that checkpoints can move between them."""


def padded_vocab(vocab_size: int) -> int:
    """The padded width of the embedding and output matrices."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Family(StrEnum):
    """How a decoder's layers differ from Llama's."""

    LLAMA = "llama"
    MISTRAL = "mistral"
    """Not at all; published models may attend to a window of earlier tokens."""
    QWEN2 = "qwen2"
    """Queries, keys and values have biases."""
    QWEN3 = "qwen3"
    """Queries and keys are normalized, each head by itself."""
    GEMMA = "gemma"
    """GELU in the place of SiLU, norms that multiply by 1 + weight, and embeddings scaled by the root of hiddenSize."""


class RopeKind(StrEnum):
    """How rotary frequencies are lowered for longer contexts."""

    LINEAR = "linear"
    """All by one factor (arXiv 2306.15595)."""
    LLAMA3 = "llama3"
    """Those of long waves by a factor, those of short waves not, and the ones between by something between."""


class RopeScaling(Spec):
    """Rotary frequencies for contexts longer than those that a model was first trained on."""

    kind: RopeKind
    """kind is linear or llama3."""
    factor: float = Field(gt=0)
    """factor divides frequencies."""
    low_frequency_factor: float = Field(1.0, gt=0)
    """lowFrequencyFactor: waves longer than originalContext over this are divided by the whole factor; of llama3."""
    high_frequency_factor: float = Field(4.0, gt=0)
    """highFrequencyFactor: waves shorter than originalContext over this are left alone; of llama3."""
    original_context: int = Field(8192, ge=1)
    """originalContext is the number of tokens that the model was first trained on; of llama3."""


class Architecture(Spec):
    """A decoder: pre-RMSNorm, gated feed-forward, rotary embeddings, grouped-query attention."""

    layers: int = Field(ge=1, le=10_000)
    """layers is the number of transformer blocks."""
    hidden_size: int = Field(ge=8, le=2**20)
    """hiddenSize is the width of the residual stream."""
    heads: int = Field(ge=1, le=2**16)
    """heads is the number of query heads; must divide hiddenSize."""
    kv_heads: int = Field(ge=1, le=2**16)
    """kvHeads is the number of key and value heads; must divide heads."""
    ffn_hidden_size: int = Field(ge=8, le=2**22)
    """ffnHiddenSize is the inner width of the SwiGLU feed-forward block."""
    rope_base: float = Field(10_000.0, gt=0)
    """ropeBase is the base of the rotary embedding frequencies."""
    norm_epsilon: float = Field(1e-5, gt=0)
    """normEpsilon is added to the variance in RMSNorm."""
    init_std: float = Field(0.02, gt=0)
    """initStd is the standard deviation of the initial weights."""
    tie_embeddings: bool = False
    """tieEmbeddings shares one matrix between input embedding and output."""
    family: Family = Family.LLAMA
    """family is how the layers differ from Llama's."""
    head_width: int | None = Field(None, ge=2, le=2**16)
    """headWidth is the width of a head; hiddenSize over heads if unset."""
    rope_scaling: RopeScaling | None = None
    """ropeScaling lowers the rotary frequencies."""
    window: int | None = Field(None, ge=1)
    """window is how many tokens back a token sees, itself included; all if unset. Samples may not be longer."""

    @model_serializer(mode="wrap")
    def _without_defaults_of_families(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what only imported models set, so that the identity of other work stays what it is."""
        left_out = {name for name in ("family", "head_width", "rope_scaling", "window") if self._is_default(name)}
        left_out |= {type(self).model_fields[name].alias or name for name in left_out}
        return {name: value for name, value in serialize(self).items() if name not in left_out}

    def _is_default(self, name: str) -> bool:
        return bool(getattr(self, name) == type(self).model_fields[name].default)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.hidden_size // self.heads

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.family is Family.QWEN2

    @property
    def has_qk_norm(self) -> bool:
        """Whether the queries and keys of each head are normalized."""
        return self.family is Family.QWEN3

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by on their way into the first layer."""
        return math.sqrt(self.hidden_size) if self.family is Family.GEMMA else 1.0

    @property
    def num_biases(self) -> int:
        """Parameters in the biases of a layer, which tensor ranks split."""
        return self.head_dim * (self.heads + 2 * self.kv_heads) if self.has_qkv_bias else 0

    @property
    def num_head_norms(self) -> int:
        """Parameters in a layer's norms of queries and keys, of which each tensor rank has all."""
        return 2 * self.head_dim if self.has_qk_norm else 0

    def num_parameters(self, vocab_size: int) -> int:
        """Number of parameters with an unpadded vocabulary, embeddings included."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        feed_forward = 3 * self.hidden_size * self.ffn_hidden_size
        per_layer = attention + self.num_biases + self.num_head_norms + feed_forward + 2 * self.hidden_size
        embeddings = vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.layers * per_layer + self.hidden_size + embeddings


PRESETS: dict[str, Architecture] = {
    "llama-nano": Architecture(layers=4, hidden_size=128, heads=4, kv_heads=2, ffn_hidden_size=384),
    "llama-micro": Architecture(layers=6, hidden_size=256, heads=8, kv_heads=4, ffn_hidden_size=704),
    "llama-125m": Architecture(layers=12, hidden_size=768, heads=12, kv_heads=12, ffn_hidden_size=2048),
    "llama-1b": Architecture(
        layers=16, hidden_size=2048, heads=32, kv_heads=8, ffn_hidden_size=8192, rope_base=500_000.0
    ),
    "llama-7b": Architecture(layers=32, hidden_size=4096, heads=32, kv_heads=32, ffn_hidden_size=11008),
    "llama-8b": Architecture(
        layers=32, hidden_size=4096, heads=32, kv_heads=8, ffn_hidden_size=14336, rope_base=500_000.0
    ),
    "llama-70b": Architecture(
        layers=80, hidden_size=8192, heads=64, kv_heads=8, ffn_hidden_size=28672, rope_base=500_000.0
    ),
}
"""Published dimensions of the Llama family (arXiv 2307.09288, 2407.21783), and two that train on a laptop."""


_NEEDED = ("layers", "hiddenSize", "heads", "kvHeads", "ffnHiddenSize")
_COMPLETE = f"(has(self.preset) || ({' && '.join(f'has(self.{name})' for name in _NEEDED)}))"


def cel_dimension(name: str, *, model: str) -> str:
    """A dimension of a ``ModelSpec`` in CEL: as written, else the preset's, else 0.

    Args:
        name: as in manifests.
        model: the CEL expression of the block.
    """
    of_presets = ", ".join(f"'{preset}': {arch.dump()[name]}" for preset, arch in sorted(PRESETS.items()))
    preset = f"has({model}.preset) ? {{{of_presets}}}[{model}.preset] : 0"
    return f"(has({model}.{name}) ? {model}.{name} : {preset})"


def _self(name: str) -> str:
    return cel_dimension(name, model="self")


class ModelSpec(Spec):
    """A preset, a preset with some dimensions overridden, or all dimensions."""

    model_config = api_rules(
        rule(_COMPLETE, f"set a preset, or {', '.join(_NEEDED[:-1])} and {_NEEDED[-1]}"),
        rule(
            f"!{_COMPLETE} || {_self('hiddenSize')} % (2 * {_self('heads')}) == 0",
            "hiddenSize must be an even multiple of the number of heads",
        ),
        rule(f"!{_COMPLETE} || {_self('heads')} % {_self('kvHeads')} == 0", "kvHeads must divide heads"),
    )

    preset: str | None = Field(None, max_length=40, json_schema_extra={"enum": [*sorted(PRESETS)]})
    """preset names published dimensions; the other fields override them."""
    layers: int | None = Field(None, ge=1, le=10_000)
    """layers is the number of transformer blocks."""
    hidden_size: int | None = Field(None, ge=8, le=2**20)
    """hiddenSize is the width of the residual stream."""
    heads: int | None = Field(None, ge=1, le=2**16)
    """heads is the number of query heads; must divide hiddenSize."""
    kv_heads: int | None = Field(None, ge=1, le=2**16)
    """kvHeads is the number of key and value heads; must divide heads."""
    ffn_hidden_size: int | None = Field(None, ge=8, le=2**22)
    """ffnHiddenSize is the inner width of the SwiGLU feed-forward block."""
    rope_base: float | None = Field(None, gt=0)
    """ropeBase is the base of the rotary embedding frequencies."""
    norm_epsilon: float | None = Field(None, gt=0)
    """normEpsilon is added to the variance in RMSNorm."""
    init_std: float | None = Field(None, gt=0)
    """initStd is the standard deviation of the initial weights."""
    tie_embeddings: bool | None = None
    """tieEmbeddings shares one matrix between input embedding and output."""

    @property
    def architecture(self) -> Architecture:
        """All dimensions: the preset's, overridden by the fields that are set."""
        base = PRESETS[self.preset].dump() if self.preset else {}
        over = {k: v for k, v in self.dump().items() if k != "preset"}
        return Architecture.model_validate({**base, **over})

    def dump_without(self, parts: Collection[Part]) -> dict[str, Any]:
        """All dimensions, each of which determines the result: a preset equals its dimensions written out."""
        return self.architecture.dump()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.preset is not None and self.preset not in PRESETS:
            raise FieldError("preset", self.preset, f"choose one of {', '.join(sorted(PRESETS))}")
        missing = [name for name in _NEEDED if name not in self.dump()]
        if self.preset is None and missing:
            raise FieldError("preset", None, f"set a preset, or set {', '.join(missing)} too")
        arch = self.architecture
        if arch.hidden_size % (2 * arch.heads):
            raise FieldError(
                "heads", arch.heads, f"hiddenSize {arch.hidden_size} must be an even multiple of the number of heads"
            )
        if arch.heads % arch.kv_heads:
            raise FieldError("kvHeads", arch.kv_heads, f"must divide heads, {arch.heads}")
        return self
