"""Learning from demonstrations: the likelihood of what is trained on, given what stands before it in its document.

Shapes: 1 the row of a micro-batch, T its tokens.
"""

from collections.abc import Callable

import torch

from headrace_trainer.engine.losses import masked_sum
from headrace_trainer.engine.objective import Loss
from headrace_trainer.engine.packed import PackedBatch
from headrace_trainer.engine.packs import PackedSamples
from headrace_trainer.formats.packs import Pack


class Supervised(PackedSamples):
    """The mean negative log-likelihood over the labels that are trained on."""

    METRICS = ()

    def collate(self, samples: list[Pack], weights: list[float], device: torch.device) -> PackedBatch:
        """Packs -> one row."""
        return self.row(samples, weights, device)

    def forward(
        self, model: torch.nn.Module, batch: PackedBatch
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
        """Losses of the row's labels."""

        def loss(losses_1T: torch.Tensor) -> Loss:
            return Loss(total=masked_sum(losses_1T.float(), batch.mask_1T), count=batch.mask_1T.sum().to(torch.int32))

        return batch.run(model, labels=batch.labels_1T), loss
