"""Low-rank adapters (arXiv 2106.09685): W x becomes W x + alpha / rank B A x, and W stays as it is.

In: a model whose weights are set, before it is wrapped for training. Out: the same model, in which only adapters and a new
scalar head are trained; after training, the model with the adapters merged into its matrices.

Between A and B an activation is only ``rank`` wide, so that is what tensor ranks exchange: where the matrix is cut by its
outputs, A is whole on every rank and B is cut as the matrix is; where it is cut by its inputs, A is cut and B is whole.

Shapes: S sequence, or this tensor rank's part of it where the sequence is split; B batch, R rank, I inputs of a matrix on
this rank, O its outputs.
"""

import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch.nn import functional

from headrace_api.stages import Lora, LoraTarget
from headrace_trainer.engine.device.megatron import (
    MegatronModule,
    TransformerConfig,
    apply_swiglu_sharded_factory,
    get_attr_wrapped_model,
    make_sharded_tensors_for_checkpoint,
    parallel_state,
    tensor_parallel,
)
from headrace_trainer.engine.model.scalar_head import ScalarHead
from headrace_trainer.engine.model.start import draw, shards

A, B = "lora_a", "lora_b"
"""The factors' names in checkpoints, after the matrix's own."""


class Cut(Enum):
    """How tensor ranks share a matrix."""

    OUTPUTS = auto()
    INPUTS = auto()


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a matrix stands in a layer."""

    block: str
    name: str
    cut: Cut
    gated: bool = False
    """Whether each rank's outputs are of two matrices: its part of the gate, then its part of the other."""


PLACES = {
    LoraTarget.QKV: Place(block="self_attention", name="linear_qkv", cut=Cut.OUTPUTS),
    LoraTarget.PROJ: Place(block="self_attention", name="linear_proj", cut=Cut.INPUTS),
    LoraTarget.FC1: Place(block="mlp", name="linear_fc1", cut=Cut.OUTPUTS, gated=True),
    LoraTarget.FC2: Place(block="mlp", name="linear_fc2", cut=Cut.INPUTS),
}


class LoraLinear(MegatronModule):  # type: ignore[misc]
    """One of Megatron's linear layers with an adapter. In checkpoints the layer's own weights keep their names.

    Args:
        base: the layer.
        config: the model's.
        lora: rank and scale.
        place: where the layer stands.
    """

    def __init__(self, base: torch.nn.Module, *, config: TransformerConfig, lora: Lora, place: Place) -> None:
        super().__init__(config=config)
        self.base, self.place, self.scale = base, place, lora.alpha / lora.rank
        num_outputs, num_inputs = base.weight.shape
        self.lora_a = torch.nn.Parameter(base.weight.new_empty(lora.rank, num_inputs))
        self.lora_b = torch.nn.Parameter(base.weight.new_empty(num_outputs, lora.rank))
        whole, cut = (self.lora_a, self.lora_b) if place.cut is Cut.OUTPUTS else (self.lora_b, self.lora_a)
        tensor_parallel.set_tensor_model_parallel_attributes(cut, is_parallel=True, dim=self._cut_axis, stride=1)
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(whole)
        # What is whole sees only this rank's part of a split sequence: its gradients are added up over tensor ranks.
        whole.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._register_load_state_dict_pre_hook(_name_base)

    def forward(self, x_SBI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's output with the adapter's added, and the layer's bias, as Megatron's layers give them."""
        output, bias = self.base(x_SBI)
        low_SBR = self._exchanged(functional.linear(self._normalized(x_SBI), self.lora_a))
        return output + functional.linear(low_SBR * self.scale, self.lora_b), bias

    def _normalized(self, x_SBI: torch.Tensor) -> torch.Tensor:
        """What the matrix sees: Transformer Engine's layers may begin with a norm."""
        weight = getattr(self.base, "layer_norm_weight", None)
        if weight is None:
            return x_SBI
        return functional.rms_norm(x_SBI, weight.shape, weight, self.config.layernorm_epsilon)

    def _exchanged(self, low_SBR: torch.Tensor) -> torch.Tensor:
        """Each rank's part -> what its part of B goes on with."""
        split = self.config.sequence_parallel
        if self.place.cut is Cut.OUTPUTS:
            move = (
                tensor_parallel.gather_from_sequence_parallel_region
                if split
                else tensor_parallel.copy_to_tensor_model_parallel_region
            )
        else:
            move = (
                tensor_parallel.reduce_scatter_to_sequence_parallel_region
                if split
                else tensor_parallel.reduce_from_tensor_model_parallel_region
            )
        moved: torch.Tensor = move(low_SBR)
        return moved

    @torch.no_grad()
    def merged(self) -> torch.nn.Module:
        """The layer, with the adapter added to its weights."""
        weight: torch.Tensor = self.base.weight
        weight.copy_(weight.float() + self.scale * self.lora_b.float() @ self.lora_a.float())
        return self.base

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The layer's own weights, and both factors beside them."""
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {A: self.lora_a, B: self.lora_b},
            prefix,
            {B if self.place.cut is Cut.OUTPUTS else A: self._cut_axis},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group", parallel_state.get_data_parallel_group()),
        )
        if self.place.gated:
            sharded[prefix + B] = apply_swiglu_sharded_factory(sharded[prefix + B], sharded_offsets)
        own: dict[str, Any] = self.base.sharded_state_dict(prefix, sharded_offsets, metadata)
        return own | sharded

    @property
    def _cut_axis(self) -> int:
        return 0 if self.place.cut is Cut.OUTPUTS else 1


def _name_base(state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints know a layer's weights by the same names with an adapter and without."""
    for name in [name for name in state if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        if own not in (A, B):
            state[f"{prefix}base.{own}"] = state.pop(name)


def add_adapters(model: MegatronModule, lora: Lora) -> None:
    """Freeze a model whose weights are set, but for a scalar head, and put adapters in; what is in them is undefined.

    Args:
        model: from ``build_model``, not wrapped for training.
        lora: rank, scale, and which matrices.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(isinstance(module, ScalarHead))
    for layer in get_attr_wrapped_model(model, "decoder").layers:
        for place in (PLACES[target] for target in lora.targets):
            block = getattr(layer, place.block)
            base = getattr(block, place.name)
            setattr(block, place.name, LoraLinear(base, config=model.config, lora=lora, place=place))


@torch.no_grad()
def fill_adapters(model: MegatronModule, *, seed: int) -> None:
    """Start: A normal with the variance of PEFT's uniform numbers, 1 / (3 I) for the I inputs of the whole matrix; B 0.

    So the model begins as what it was, and the same under every layout.
    """
    for shard in shards(model):
        if shard.key.endswith(A):
            part = draw(shard, seed=seed).div_(math.sqrt(3 * shard.global_shape[-1]))
            shard.data.copy_(part.reshape(shard.data.shape))
        elif shard.key.endswith(B):
            shard.data.zero_()


def merge_adapters(model: MegatronModule) -> None:
    """Add the adapters to their matrices, and take them out."""
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, LoraLinear):
                setattr(module, name, child.merged())
