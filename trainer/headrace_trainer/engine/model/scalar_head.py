"""One number for each token: a reward in place of the next token's logits, or a value beside them.

The head stands where a language model has its output layer, or beside it, in the last pipeline stage, so gradients, optimizer,
checkpoints and layouts treat it as they treat every other weight. Its key in checkpoints is its own: a language model's
output layer is never read into it.

Shapes: S sequence, or this tensor rank's part of it where the sequence is split; B batch, H hidden size.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from headrace_trainer.engine.checkpoint.state import load_partly, load_weights
from headrace_trainer.engine.device.megatron import (
    MegatronModule,
    ShardedTensor,
    TransformerConfig,
    make_sharded_tensors_for_checkpoint,
    parallel_state,
    tensor_parallel,
)

HEAD_KEY = "scalar_head.weight"
"""The head's name in checkpoints."""
VALUE_PLACE = "value_head.weight"
"""Its name in a model that has a language model's head as well."""
_PLACES = ("output_layer.weight", VALUE_PLACE)
"""Its names in models."""


def head_std(hidden_size: int) -> float:
    """Standard deviation of start weights: scores of normalised activations begin with one of about 1 (arXiv 2009.01325)."""
    return 1 / math.sqrt(hidden_size + 1)


class ScalarHead(MegatronModule):  # type: ignore[misc]
    """A linear map to one number, without a bias, the same on every tensor rank; computed in fp32.

    Args:
        config: the model's.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))

    def forward(
        self, hidden_SBH: torch.Tensor, weight: None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        """Scores [sequence, B, 1] and no bias, as Megatron's output layers give them; the other arguments are theirs."""
        assert weight is None, "a scalar head shares no weight with the embedding"
        if self.config.sequence_parallel:
            # Every rank goes on with all scores, so each gradient is whole on each rank, and none is added up.
            hidden_SBH = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False
            )
        return functional.linear(hidden_SBH.float(), self.weight.float()), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor]:
        """The weight, replicated over tensor ranks, under its own name in checkpoints."""
        sharded: dict[str, ShardedTensor] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            sharded_offsets=sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group", parallel_state.get_data_parallel_group()),
        )
        for tensor in sharded.values():
            tensor.key = HEAD_KEY
        return sharded


def load_language_model(model: MegatronModule, folder: Path) -> None:
    """Read a language model's weights into a model with a scalar head, whose head stays as it is. Every rank calls.

    Args:
        model: from ``build_model``, with a scalar head, not wrapped for training.
        folder: a checkpoint, of any layout.
    """
    load_weights(_Without(model, _PLACES), folder)


def without_value_head(model: MegatronModule) -> "_Without":
    """A model as far as reading and writing weights is concerned, and nothing of a value head beside its own, if any."""
    return _Without(model, (VALUE_PLACE,))


class _Without:
    """A model as far as its weights are concerned, and nothing of some of them."""

    def __init__(self, model: MegatronModule, places: Collection[str]) -> None:
        self._model, self._places = model, tuple(places)

    def sharded_state_dict(self, **kwargs: Any) -> dict[str, Any]:
        sharded = self._model.sharded_state_dict(**kwargs)
        return {
            name: entry
            for name, entry in sharded.items()
            if not (name.endswith(self._places) and entry.key == HEAD_KEY)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_partly(self._model, state, lacking=self._places)
