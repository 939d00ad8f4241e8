"""How ranks are laid out (tensor x pipeline x data), and what each axis must divide.

In: a ``parallelism`` block, an architecture, a number of ranks. Out: a validated ``Layout``.
"""

from dataclasses import dataclass

from pydantic import Field

from headrace_api.base import FieldError, Spec
from headrace_api.model import VOCAB_MULTIPLE, Architecture

MAX_TENSOR = VOCAB_MULTIPLE // 128
SPLIT_BY_TENSOR = ("kvHeads", "ffnHiddenSize")
"""What the tensor axis must divide. That covers the heads, which are a multiple of kvHeads."""


class Parallelism(Spec):
    """The axes that split one replica of the model. The remaining ranks form the data axis."""

    tensor: int = Field(1, ge=1, le=MAX_TENSOR)
    """tensor is the number of ranks that share each matrix; keep it within one node."""
    pipeline: int = Field(1, ge=1, le=1024)
    """pipeline is the number of pipeline stages that the layers are divided into."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks per axis; their product is the world size."""

    tensor: int
    pipeline: int
    data: int

    @property
    def world(self) -> int:
        """The world size."""
        return self.tensor * self.pipeline * self.data


def divisors(number: int, *, at_most: int | None = None) -> str:
    """The divisors of ``number`` as prose: ``1, 2 or 4``."""
    found = [str(d) for d in range(1, min(number, at_most or number) + 1) if number % d == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


def split_model(parallelism: Parallelism, arch: Architecture) -> None:
    """Check the axes against the model.

    Raises:
        FieldError: an axis does not divide what it splits. The field is relative to the stage's typed block.
    """
    tensor, pipeline = parallelism.tensor, parallelism.pipeline
    if arch.heads % tensor:
        raise FieldError(
            "parallelism.tensor",
            tensor,
            f"must divide the model's {arch.heads} heads; use {divisors(arch.heads, at_most=MAX_TENSOR)}",
        )
    if arch.kv_heads % tensor:
        raise FieldError(
            "parallelism.tensor",
            tensor,
            f"must divide the model's {arch.kv_heads} kvHeads; use {divisors(arch.kv_heads, at_most=MAX_TENSOR)}",
        )
    if arch.ffn_hidden_size % tensor:
        raise FieldError("parallelism.tensor", tensor, f"must divide ffnHiddenSize, {arch.ffn_hidden_size}")
    if arch.layers % pipeline:
        raise FieldError(
            "parallelism.pipeline",
            pipeline,
            f"must divide the model's {arch.layers} layers; use {divisors(arch.layers)}",
        )


def layout(parallelism: Parallelism, *, num_ranks: int) -> Layout:
    """Check the axes against the gang.

    Args:
        parallelism: the axes asked for.
        num_ranks: ranks in the gang, nodes x ranks a node.

    Raises:
        FieldError: a replica's ranks do not divide the gang; the field is relative to the stage's typed block.
    """
    tensor, pipeline = parallelism.tensor, parallelism.pipeline
    replica = tensor * pipeline
    if num_ranks % replica:
        raise FieldError(
            "parallelism",
            f"tensor {tensor} x pipeline {pipeline}",
            f"{replica} ranks per replica must divide the gang's {num_ranks} (compute.nodes x compute.ranksPerNode)",
        )
    return Layout(tensor=tensor, pipeline=pipeline, data=num_ranks // replica)
