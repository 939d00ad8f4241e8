"""Causal attention for Megatron's local layers, by torch's fused kernel.

Shapes: S sequence, B batch, H query heads of this tensor rank, G key/value heads of it, D width of a head.
"""

from typing import Any

import torch
from torch.nn import functional

from headrace_trainer.engine.device.megatron import MegatronModule, TransformerConfig


class CausalAttention(MegatronModule):  # type: ignore[misc]
    """softmax(q k^T / sqrt(D)) v over earlier positions (arXiv 1706.03762, eq. 1), several query heads a key head.

    Megatron builds it from a layer spec; the arguments that it passes and that do not matter here are accepted.
    """

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, **_unused: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self, q_SBHD: torch.Tensor, k_SBGD: torch.Tensor, v_SBGD: torch.Tensor, *_unused: Any, **_ignored: Any
    ) -> torch.Tensor:
        """Attend.

        Returns:
            [S, B, H x D].
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHD, k_SBGD, v_SBGD))
        mixed_BHSD = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.size(1) != k.size(1)
        )
        return mixed_BHSD.permute(2, 0, 1, 3).flatten(2)
