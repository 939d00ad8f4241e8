"""Which of an attempt's pods explains how it ended. Pure; both bodies choose by it.

One fault of a gang makes many: peers lose their connections, and what is left is stopped. The explanation is the worst
fault, and among equals the first.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from headrace_api.faults import FaultClass, Outcome

_NEVER = datetime.max.replace(tzinfo=UTC)
_WEIGHTS: dict[FaultClass | None, int] = {FaultClass.USER: 0, FaultClass.STORAGE: 1, FaultClass.STALL: 3}
"""Lower explains more. Bad data and dead storage say so themselves. After that comes a pod that was taken from outside,
for the others then fail of its absence, and a rank that hangs, for which the others wait in vain."""
_TAKEN, _OTHERS = 2, 4


@dataclass(frozen=True, kw_only=True)
class End:
    """How one pod of an attempt ended."""

    outcome: Outcome
    index: int
    """The pod's place in the gang."""
    at: datetime | None = None
    """When it ended; None if unknown."""
    taken: bool = False
    """Whether something outside ended it, as an eviction, a preemption or the kernel for want of memory."""


def explain_failure(ends: Iterable[End]) -> Outcome | None:
    """The outcome of a failed attempt; None if no pod says anything of a failure."""
    failures = [end for end in ends if end.outcome.fault is not None]
    first = min(failures, key=lambda end: (_weight(end), end.at or _NEVER, end.index), default=None)
    return first.outcome if first is not None else None


def explain_success(ends: Iterable[End]) -> Outcome | None:
    """The outcome of an attempt that succeeded: what the pod says that wrote the artifact."""
    successes = [end for end in ends if end.outcome.fault is None]
    writer = min(successes, key=lambda end: (end.outcome.artifact_digest is None, end.index), default=None)
    return writer.outcome if writer is not None else None


def _weight(end: End) -> int:
    weight = _WEIGHTS.get(end.outcome.fault, _OTHERS)
    return min(weight, _TAKEN) if end.taken else weight
