"""Causal attention for Megatron's local layers, by torch's fused kernel.

Shapes: S sequence, B batch, H query heads of this tensor rank, G key/value heads of it, D width of a head.
"""

from typing import Any

import torch
from torch.nn import functional

from headrace_trainer.engine.device.megatron import AttnMaskType, MegatronModule, TransformerConfig


class CausalAttention(MegatronModule):  # type: ignore[misc]
    """softmax(q k^T / sqrt(D)) v over earlier positions (arXiv 1706.03762, eq. 1), several query heads a key head.

    Megatron builds it from a layer spec. What would change the result and is not done here is refused.

    Args:
        config: the model's.
        attn_mask_type: causal.
        attention_type: self.
        attention_dropout: none; the configuration's if None.
        softmax_scale: multiplies q k^T; 1/sqrt(D) if None.
        layer: the layer's number and what else Megatron says of it; changes nothing.

    Raises:
        NotImplementedError: another mask type, cross attention, dropout, a window, sinks, or a context that is split over ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **layer: Any,
    ) -> None:
        super().__init__(config=config)
        _refuse_mask_type(attn_mask_type)
        _refuse(f"type {attention_type!r}", attention_type != "self")
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        _refuse("dropout", dropout != 0)
        _refuse("a window", config.window_size is not None)
        _refuse(f"softmax_type {config.softmax_type!r}", config.softmax_type != "vanilla")
        _refuse("context parallelism", config.context_parallel_size != 1)
        self.scale = softmax_scale

    def forward(
        self,
        q_SBHD: torch.Tensor,
        k_SBGD: torch.Tensor,
        v_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend.

        Returns:
            [S, B, H x D].

        Raises:
            NotImplementedError: a mask, a bias, packed sequences, or keys of more positions than queries.
        """
        _refuse("an attention mask", attention_mask is not None)
        _refuse("an attention bias", attention_bias is not None)
        _refuse("packed sequences", packed_seq_params is not None)
        _refuse_mask_type(attn_mask_type or AttnMaskType.causal)
        # torch lines the first query up with the first key, which is wrong for queries that come after cached keys.
        _refuse("a cache of keys", q_SBHD.size(0) != k_SBGD.size(0))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHD, k_SBGD, v_SBGD))
        mixed_BHSD = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.size(1) != k.size(1)
        )
        return mixed_BHSD.permute(2, 0, 1, 3).flatten(2)


def _refuse_mask_type(kind: AttnMaskType) -> None:
    _refuse(f"a mask of type {kind.name!r}", kind is not AttnMaskType.causal)


def _refuse(what: str, is_asked_for: bool) -> None:
    if is_asked_for:
        raise NotImplementedError(f"attention with {what}: only plain causal attention is done here")
