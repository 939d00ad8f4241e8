"""Which samples a rank reads at a step.

Samples are numbered through the whole run. A global batch takes the next ones, and its positions are dealt out to
micro-batches and replicas; so any number of replicas sees the same global batches, and the number of consumed samples
is the whole state of the data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from headrace_trainer.engine.objective import Objective
from headrace_trainer.engine.parallel import Gang


class Samples(Protocol):
    """Samples in a fixed order."""

    num_samples: int
    """Samples in one epoch."""

    def sample(self, index: int) -> Any:
        """Sample ``index`` of the run, as the objective's ``collate`` takes it."""


def positions(*, size: int, micro_batch_size: int, data_rank: int, data_ranks: int) -> list[list[int]]:
    """The positions of a global batch that one replica reads, by micro-batch.

    Args:
        size: samples in the global batch; rounded up to fill the last round of micro-batches.
        micro_batch_size: samples in a forward pass.
        data_rank: the replica.
        data_ranks: the number of replicas.
    """
    rounds = -(-size // (micro_batch_size * data_ranks))
    firsts = [(i * data_ranks + data_rank) * micro_batch_size for i in range(rounds)]
    return [list(range(first, first + micro_batch_size)) for first in firsts]


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """One rank's part of a global batch. Micro-batches are read as they are asked for: while the GPU computes."""

    num_micro_batches: int
    micro_batches: Iterator[Any]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Reads this rank's part of any global batch."""

    samples: Samples
    objective: Objective
    gang: Gang
    micro_batch_size: int

    def read(self, first: int, size: int) -> GlobalBatch:
        """This rank's part of the global batch of samples ``first`` to ``first + size - 1``.

        Where ``size`` does not fill every micro-batch, the rest are repetitions that do not count.
        """
        mine = positions(
            size=size,
            micro_batch_size=self.micro_batch_size,
            data_rank=self.gang.data_rank,
            data_ranks=self.gang.layout.data,
        )

        def micro_batch(positions: list[int]) -> Any:
            samples = [self.samples.sample(first + min(p, size - 1)) for p in positions]
            return self.objective.collate(samples, [float(p < size) for p in positions], self.gang.device)

        return GlobalBatch(num_micro_batches=len(mine), micro_batches=map(micro_batch, mine))
