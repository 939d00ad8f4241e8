"""A rank's place in the gang, and the few things that ranks tell each other.

In: the axes, from ``parallel.groups``. Out: a ``Gang``: who this rank is, and how it sums, gathers and agrees with the
others: sums of a step on the training backend, all else over a group that carries CPU tensors and Python objects on
every machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from headrace_api.parallelism import Layout
from headrace_trainer.errors import StorageError

T = TypeVar("T")


@dataclass(frozen=True)
class Sum:
    """A sum over the gang that is on its way."""

    _total: torch.Tensor
    _work: dist.Work

    def result(self) -> list[float]:
        """Wait for it; every rank gets the same numbers, bit for bit."""
        self._work.wait()
        total: list[float] = self._total.tolist()
        return total


@dataclass(frozen=True, kw_only=True)
class Gang:
    """One rank's view of the gang."""

    layout: Layout
    """Ranks on each axis."""
    rank: int
    """Number in the gang."""
    local_rank: int
    """Number on the node."""
    local_world: int
    """Ranks on the node."""
    tensor_rank: int
    data_rank: int
    pipeline_rank: int
    device: torch.device
    """Where this rank computes."""
    control: dist.ProcessGroup
    """Every rank, on gloo: for numbers and objects that are not on the GPU."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes losses."""
        return self.pipeline_rank == self.layout.pipeline - 1

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's losses go into sums: one tensor rank of the last stage of each replica."""
        return self.is_last_stage and self.tensor_rank == 0

    def start_sum(self, values: torch.Tensor) -> Sum:
        """Begin to add up a vector over all ranks, on the backend that training uses.

        Args:
            values: on this rank's device; overwritten.
        """
        work = dist.all_reduce(values, async_op=True)
        assert work is not None
        return Sum(values, work)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up ``values`` over all ranks, in float64; every rank gets the same sums, bit for bit."""
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return [float(v) for v in total.tolist()]

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, by rank, on every rank. The values must be picklable."""
        found: list[Any] = [None] * self.layout.world
        dist.all_gather_object(found, value, group=self.control)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, on every rank.

        Raises:
            StorageError: on every rank, if ``make`` raised one on rank 0.
        """
        outcome: T = _value(self.gather(_attempt(make) if self.is_first else None)[0])
        return outcome

    def together(self, act: Callable[[], T]) -> list[T]:
        """Run ``act`` on every rank, and wait for all.

        Returns:
            What each rank's ``act`` returned, by rank.

        Raises:
            StorageError: on every rank, if any rank's ``act`` raised one or an ``OSError``.
        """
        return [_value(outcome) for outcome in self.gather(_attempt(act))]

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self.control)


def _attempt(act: Callable[[], T]) -> T | StorageError:
    try:
        return act()
    except StorageError as error:
        return error
    except OSError as error:
        return StorageError(f"{error}: check the scratch volume and storage.uri")


def _value(outcome: Any) -> Any:
    if isinstance(outcome, StorageError):
        raise outcome
    return outcome
