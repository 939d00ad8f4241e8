"""Predict each token from those before it in its document alone, where samples hold parts of several documents.

A sample's documents are laid end to end in one row: attention stays inside a document, and rotary positions begin anew with
each. The token between two documents begins the second, as it begins a prompt, and is what the first must predict as its
end; so the same labels count as without the mask.

Shapes: B samples of a micro-batch, T tokens of a sample, 1 the row that they share.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from headrace_trainer.engine.device import send
from headrace_trainer.engine.losses import masked_sum
from headrace_trainer.engine.objective import Loss
from headrace_trainer.engine.packed import PackedBatch


@dataclass(frozen=True, kw_only=True)
class NextTokenInDocument:
    """The mean negative log-likelihood over all tokens."""

    begins: int
    """The token that begins a document, and ends the one before it."""

    METRICS = ()

    def shape(self, micro_batch_size: int, sequence_length: int) -> tuple[int, int]:
        """One row for all samples."""
        return 1, micro_batch_size * sequence_length

    def collate(self, samples: list[np.ndarray], weights: list[float], device: torch.device) -> PackedBatch:
        """Shift samples of T + 1 tokens into T inputs and T labels, end to end."""
        sequences = np.stack(samples).astype(np.int64)
        inputs, labels = sequences[:, :-1], sequences[:, 1:]
        starts = document_starts(inputs, begins=self.begins)
        edges = np.append(starts, inputs.size)
        lengths = np.diff(edges)
        mask = np.repeat(np.array(weights, dtype=np.float32), inputs.shape[1])
        return PackedBatch(
            tokens_1T=_row(inputs, device),
            labels_1T=_row(labels, device),
            mask_1T=_row(mask, device),
            documents_T=_row(np.repeat(np.arange(len(starts)), lengths), device)[0],
            cu_seqlens=_row(edges.astype(np.int32), device)[0],
            num_documents=len(starts),
            longest=int(lengths.max()),
        )

    def forward(
        self, model: torch.nn.Module, batch: PackedBatch
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
        """Losses of the row's labels."""

        def loss(losses_1T: torch.Tensor) -> Loss:
            return Loss(total=masked_sum(losses_1T.float(), batch.mask_1T), count=batch.mask_1T.sum().to(torch.int32))

        return batch.run(model, labels=batch.labels_1T), loss

    def figures(self, means: dict[str, float]) -> dict[str, float]:
        """As they are."""
        return means


def document_starts(inputs_BT: np.ndarray, *, begins: int) -> np.ndarray:
    """Where documents begin in the row of all samples, int64, ascending: at each sample's first token, and at each ``begins``."""
    first = inputs_BT == begins
    first[:, 0] = True
    return np.flatnonzero(first)


def _row(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return send(torch.from_numpy(np.ascontiguousarray(values.reshape(1, -1))), device)
