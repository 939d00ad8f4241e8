"""A pack on the device: a row of documents, each of which is a sequence of its own to the model.

In: ``formats.packs``. Out: what a model and a loss take. Attention stays inside a document and rotary positions begin
anew with each, so a document's losses are those that it has alone.

Shapes: 1 the micro-batch, which is one pack; T its row; D its documents.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from headrace_trainer.engine.device import send
from headrace_trainer.engine.device.megatron import PackedSeqParams
from headrace_trainer.formats.packs import Document, Pack


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One pack, the same on the tensor and pipeline ranks of a replica."""

    tokens_1T: torch.Tensor
    labels_1T: torch.Tensor
    """The next token of the same document; 0 where there is none."""
    mask_1T: torch.Tensor
    """1 where a label is trained on, else 0; float."""
    documents_T: torch.Tensor
    """Number of the document that each position belongs to; padding has number D."""
    cu_seqlens: torch.Tensor
    """Where documents begin, and where the last ends, int32; padding is one of them."""
    num_documents: int
    """D, without padding."""
    longest: int
    """Tokens of the longest document, padding included."""

    def run(self, model: torch.nn.Module, **kwargs: Any) -> torch.Tensor:
        """This stage's output: losses [1, T] with ``labels=``, else logits [1, T, V / tensor ranks], or [1, T, 1].

        Args:
            model: from ``build_model``, wrapped or not.
            kwargs: further arguments of its forward pass.
        """
        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            # No longer than needed: Megatron takes rotary angles of the whole row for positions that are not reset.
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
        )
        positions = torch.zeros_like(self.tokens_1T)  # rotary positions need no ids
        output: torch.Tensor = model(self.tokens_1T, positions, None, packed_seq_params=params, **kwargs)
        return output

    def sums(self, values_1T: torch.Tensor) -> torch.Tensor:
        """Sum over each document, [D]; what is summed should be 0 where it does not count."""
        sums = values_1T.new_zeros(self.num_documents + 1).index_add(0, self.documents_T, values_1T[0])
        return sums[: self.num_documents]

    def lasts(self, values_1T: torch.Tensor) -> torch.Tensor:
        """The value at each document's last token, [D]."""
        return values_1T[0, self.cu_seqlens[1 : self.num_documents + 1].long() - 1]


def collate(pack: Pack, *, length: int, device: torch.device) -> PackedBatch:
    """Lay a pack's documents end to end.

    Args:
        pack: at least one document, none empty.
        length: T; the rest of the row is padding. Pipeline stages and sequence parallelism need a fixed one.
        device: where to.

    Raises:
        ValueError: an empty document, or more tokens than ``length``.
    """
    lengths = [len(document.tokens) for document in pack.documents]
    padding = length - sum(lengths)
    if padding < 0 or 0 in lengths:
        raise ValueError(
            f"a pack of documents of {lengths} tokens does not fit into {length} tokens: leave out empty ones, cut long ones"
        )
    rows = [_row(document) for document in pack.documents]
    rows += [np.zeros((3, padding), np.int64)] * (padding > 0)
    lengths += [padding] * (padding > 0)
    tokens, labels, mask = np.concatenate(rows, axis=1)
    return PackedBatch(
        tokens_1T=_sent(tokens[None], device),
        labels_1T=_sent(labels[None], device),
        mask_1T=_sent(mask[None].astype(np.float32), device),
        documents_T=_sent(np.repeat(np.arange(len(lengths)), lengths), device),
        cu_seqlens=_sent(np.cumsum([0, *lengths], dtype=np.int32), device),
        num_documents=len(pack.documents),
        longest=max(lengths),
    )


def _row(document: Document) -> np.ndarray:
    """Tokens, labels and mask of labels, [3, n]; the last position has no label."""
    row = np.zeros((3, len(document.tokens)), np.int64)
    row[0] = document.tokens
    row[1, :-1], row[2, :-1] = document.tokens[1:], document.mask[1:]
    return row


def _sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return send(torch.from_numpy(np.ascontiguousarray(array)), device)
