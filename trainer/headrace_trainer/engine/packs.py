"""Packs as samples: what the objectives of post-training share.

In: packs of documents. Out: one row a forward pass, in which each document sees only itself.
"""

from collections.abc import Callable

import numpy as np
import torch

from headrace_api.stages.finetune import OfflineFinetune
from headrace_trainer import board
from headrace_trainer.engine.packed import PackedBatch, collate
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.formats.dataset import Dataset
from headrace_trainer.formats.packs import Document, Pack, Packing, PackOrder
from headrace_trainer.formats.units import Units

_AT_ONCE = 16
"""Rows that go through a model together, where nothing is trained."""
_MULTIPLE = 64
"""Rows that may have any length get one of these: kernels and allocators meet fewer of them."""


class PackedSamples:
    """Lays the packs of a micro-batch in one row.

    Args:
        fixed: whether every row has the full length, as pipeline stages need; otherwise it ends soon after its documents.
    """

    def __init__(self, *, fixed: bool) -> None:
        self._fixed = fixed
        self._capacity = 0

    def shape(self, micro_batch_size: int, sequence_length: int) -> tuple[int, int]:
        """One row for all samples."""
        self._capacity = micro_batch_size * sequence_length
        return 1, self._capacity

    def row(self, packs: list[Pack], weights: list[float], device: torch.device) -> PackedBatch:
        """The packs whose weight is not 0; if there are none, the first one with nothing that counts."""
        documents = [d for pack, weight in zip(packs, weights, strict=True) if weight for d in pack.documents]
        documents = documents or [_without_loss(d) for d in packs[0].documents]
        needed = sum(len(d) for d in documents)
        length = self._capacity if self._fixed else min(self._capacity, -(-needed // _MULTIPLE) * _MULTIPLE)
        return collate(Pack(documents=tuple(documents)), length=length, device=device)

    def figures(self, means: dict[str, float]) -> dict[str, float]:
        """As they are."""
        return means


def _without_loss(document: Document) -> Document:
    return Document(tokens=document.tokens, mask=document.mask & False)


class PackSamples:
    """The packs of all epochs, as the loop's ``Samples``.

    Args:
        units: what is packed.
        order: which units each pack has.
    """

    def __init__(self, units: Units, order: PackOrder) -> None:
        self.units, self.order = units, order
        self.num_samples = order.packs_per_epoch

    def sample(self, index: int) -> Pack:
        """Pack ``index`` of the run."""
        return self.units.pack(self.order.units(index))


def packs_of(dataset: Dataset, config: OfflineFinetune, *, seed: int) -> tuple[PackSamples, PackSamples | None]:
    """The packs of all epochs, and those of the held-out units, which are always the same; None if there are none.

    Args:
        dataset: the stage's.
        config: its typed block.
        seed: the run's.
    """
    packing = Packing.BEST_FIT if config.packing else Packing.NONE
    capacity, held_out = config.sequence_length, dataset.validation
    order = PackOrder(dataset.train.lengths, capacity=capacity, seed=seed, packing=packing, shares=dataset.shares)
    training = PackSamples(dataset.train, order)
    if held_out is None:
        return training, None
    return training, PackSamples(held_out, PackOrder(held_out.lengths, capacity=capacity, seed=0, packing=packing))


def values_of_documents(
    units: Units | None,
    gang: Gang,
    *,
    each: int,
    length: int,
    values: Callable[[list[PackedBatch]], list[torch.Tensor]],
) -> np.ndarray:
    """A number for each document of each unit; replicas share the work. Every rank calls.

    Args:
        units: none if None.
        gang: this rank's place.
        each: documents of a unit: 2 of a pair.
        length: tokens of a row.
        values: rows -> [D] of each, the same on every rank of the replica.

    Returns:
        float32 [units, each], the same on every rank.
    """
    found = np.zeros((0 if units is None else len(units), each), dtype=np.float32)
    if units is None:
        return found
    order = PackOrder(units.lengths, capacity=length, seed=0, packing=Packing.BEST_FIT)
    mine = range(gang.data_rank, order.packs_per_epoch, gang.layout.data)
    for first in range(0, len(mine), _AT_ONCE):
        numbers = [order.units(i) for i in mine[first : first + _AT_ONCE]]
        rows = [collate(units.pack(row), length=length, device=gang.device) for row in numbers]
        for row, value_D in zip(numbers, values(rows), strict=True):
            found[row] = value_D.reshape(-1, each).cpu().numpy()
        board.beat()
    parts = gang.gather(found if gang.tensor_rank == 0 and gang.is_first_stage else None)
    return np.sum([part for part in parts if part is not None], axis=0, dtype=np.float32)
