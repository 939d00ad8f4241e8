"""Architectures: the Llama family's dimensions, presets, and parameter counts.

In: a stage's ``model`` block. Out: an ``Architecture`` with every dimension filled in, for ``planning`` and the
trainer's ``model``.
"""

from collections.abc import Collection
from typing import Any, Self

from pydantic import Field, model_validator

from headrace_api.base import FieldError, Part, Spec, api_rules, rule

VOCAB_MULTIPLE = 1024
"""Every layout pads the vocabulary to a multiple of this: 128 for each of up to 8 tensor ranks. The width is the same
for all layouts, so that checkpoints can move between them."""


def padded_vocab(vocab_size: int) -> int:
    """The padded width of the embedding and output matrices."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Architecture(Spec):
    """A Llama-style decoder: pre-RMSNorm, SwiGLU, rotary embeddings, grouped-query attention."""

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

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads

    def num_parameters(self, vocab_size: int) -> int:
        """Number of parameters with an unpadded vocabulary, embeddings included."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        feed_forward = 3 * self.hidden_size * self.ffn_hidden_size
        per_layer = attention + feed_forward + 2 * self.hidden_size
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
        """All dimensions: a preset equals its dimensions written out."""
        return self.architecture.dump_without(parts)

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
