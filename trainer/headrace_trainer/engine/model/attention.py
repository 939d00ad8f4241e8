"""Causal attention for Megatron's local layers, by torch's fused kernel.

Shapes: S sequence, B batch, T row of a pack, H query heads of this tensor rank, G key/value heads of it, D width of a
head.
"""

from typing import Any

import torch
from torch.nn import functional

from headrace_trainer.engine.device.megatron import (
    AttnMaskType,
    MegatronModule,
    PackedSeqParams,
    TransformerConfig,
)


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
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend: within each sequence, or within each document of a pack.

        Args:
            q: [S, B, H, D], or [T, H, D] of a pack.
            k: [keys, B, G, D], or [T, G, D].
            v: as ``k``.
            attention_mask: [B, 1, queries, keys], True where a key is hidden, later ones included; what a causal mask
                hides if None.
            attn_mask_type: causal, or none for one query that comes after cached keys.
            attention_bias: none.
            packed_seq_params: where the documents of a pack begin; q, k and v are of a pack if given.

        Returns:
            [S, B, H x D], or [T, H, D].

        Raises:
            NotImplementedError: a bias, another mask type, packs in another format or with a mask, or several queries
                after cached keys without a mask.
        """
        _refuse("an attention bias", attention_bias is not None)
        if packed_seq_params is not None:
            _refuse("a mask over packs", attention_mask is not None)
            _refuse_mask_type(attn_mask_type or AttnMaskType.causal)
            return self._within_documents(q, k, v, _lengths(packed_seq_params))
        # torch lines the first query up with the first key, which is wrong for queries that come after cached keys.
        # One query, the newest, sees every key, which needs no mask; Megatron says so by its type.
        num_queries, num_keys = q.size(0), k.size(0)
        _refuse("several queries after cached keys", attention_mask is None and 1 < num_queries < num_keys)
        if num_queries > 1 and attention_mask is None:
            _refuse_mask_type(attn_mask_type or AttnMaskType.causal)
        mixed_BHSD = self._attend(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), hidden=attention_mask)
        return mixed_BHSD.permute(2, 0, 1, 3).flatten(2)

    def _within_documents(
        self, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """One call a document: less work than one with a mask, and nothing can leak."""
        documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q_THD, k_TGD, v_TGD)), strict=True)
        mixed_HTD = torch.cat([self._attend(*(x[None] for x in document))[0] for document in documents], dim=1)
        return mixed_HTD.transpose(0, 1)

    def _attend(
        self,
        q_BHSD: torch.Tensor,
        k_BGSD: torch.Tensor,
        v_BGSD: torch.Tensor,
        *,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            q_BHSD,
            k_BGSD,
            v_BGSD,
            attn_mask=None if hidden is None else ~hidden,
            is_causal=hidden is None and q_BHSD.size(2) == k_BGSD.size(2),
            scale=self.scale,
            enable_gqa=q_BHSD.size(1) != k_BGSD.size(1),
        )


def _lengths(packs: PackedSeqParams) -> list[int]:
    """Tokens of each document, on the host."""
    _refuse(f"packs in the format {packs.qkv_format!r}", packs.qkv_format != "thd")
    _refuse("padding between documents", packs.cu_seqlens_q_padded is not None)
    lengths: list[int] = packs.cu_seqlens_q.diff().tolist()
    return lengths


def _refuse_mask_type(kind: AttnMaskType) -> None:
    _refuse(f"a mask of type {kind.name!r}", kind is not AttnMaskType.causal)


def _refuse(what: str, is_asked_for: bool) -> None:
    if is_asked_for:
        raise NotImplementedError(f"attention with {what}: that is not done here")
