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
    SelfAttention,
    StaticInferenceContext,
    TransformerConfig,
    apply_rotary_pos_emb,
)


class CausalAttention(MegatronModule):  # type: ignore[misc]
    """softmax(q k^T / sqrt(D)) v over earlier positions (arXiv 1706.03762, eq. 1), several query heads a key head.

    Megatron builds it from a layer spec. What it does not support, and would change the result, it refuses.

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
        if num_queries == 1 and num_keys > 1:
            return self._newest(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), hidden=attention_mask)
        mixed_BHSD = self._attend(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), hidden=attention_mask)
        return mixed_BHSD.permute(2, 0, 1, 3).flatten(2)

    def _newest(
        self, q_BH1D: torch.Tensor, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor, *, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """One query a head: those of the heads that share a key head are taken together, which is one product for all."""
        q_BGRD = q_BH1D.reshape(*k_BGSD.shape[:2], -1, q_BH1D.size(-1))
        return self._attend(q_BGRD, k_BGSD, v_BGSD, hidden=hidden, is_causal=False).flatten(1)[None]

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
        is_causal: bool = True,
    ) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            q_BHSD,
            k_BGSD,
            v_BGSD,
            attn_mask=None if hidden is None else ~hidden,
            is_causal=is_causal and hidden is None,
            scale=self.scale,
            enable_gqa=q_BHSD.size(1) != k_BGSD.size(1),
        )


class CachingSelfAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's attention layer, whose cache holds keys that are rotated already.

    Megatron's own static cache holds them as they were before, and rotates all of them again for every token.
    """

    def _adjust_key_value_for_inference(
        self,
        inference_context: StaticInferenceContext | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary_pos_emb: tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Rotate queries and keys, add keys and values [S, B, G, D] to the cache, and give all that are in it."""
        if inference_context is None:
            return query, key, value, rotary_pos_emb, self.attn_mask_type, None
        begin = inference_context.sequence_len_offset
        end = begin + key.size(0)
        # Both at once: where a batch adds one position, what counts is the number of operations.
        both = torch.cat((query, key), dim=2)
        angles = rotary_pos_emb[0][begin:end]
        both = apply_rotary_pos_emb(both, angles, config=self.config, cp_group=self.pg_collection.cp)
        query, key = both.split((query.size(2), key.size(2)), dim=2)
        cache = inference_context.key_value_memory_dict
        if self.layer_number not in cache:
            shape = (*key.shape[1:3], inference_context.max_sequence_length, key.size(3))
            cache[self.layer_number] = (key.new_empty(shape), value.new_empty(shape))
        for memory_BGSD, new in zip(cache[self.layer_number], (key, value), strict=True):
            memory_BGSD[:, :, begin:end] = new.permute(1, 2, 0, 3)
        keys, values = (memory[:, :, :end].permute(2, 0, 1, 3) for memory in cache[self.layer_number])
        mask_type = AttnMaskType.no_mask if begin else self.attn_mask_type
        return query, keys, values, None, mask_type, None


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
        raise NotImplementedError(f"attention with {what}: not supported")
