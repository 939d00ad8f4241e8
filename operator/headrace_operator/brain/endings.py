"""Which pod's outcome explains how an attempt ended. Pure; shared by both bodies.

One fault in a gang causes others: peers lose their connections and the rest is stopped. The worst fault explains the
failure; among equals, the earliest.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from headrace_api.faults import FaultClass, Outcome

_NEVER = datetime.max.replace(tzinfo=UTC)
_WEIGHTS: dict[FaultClass | None, int] = {FaultClass.USER: 0, FaultClass.STORAGE: 1, FaultClass.STALL: 3}
"""Lower weighs more. Bad data and failing storage name themselves. Next come pods disrupted from outside, since their
peers then fail for lack of them, and hung ranks, which stall their peers."""
_TAKEN, _OTHERS = 2, 4


@dataclass(frozen=True, kw_only=True)
class End:
    """How one pod of an attempt ended."""

    outcome: Outcome
    index: int
    """The pod's completion index."""
    at: datetime | None = None
    """End time; None if unknown."""
    taken: bool = False
    """Whether it was disrupted from outside: evicted, preempted, or killed for lack of memory."""


def explain_failure(ends: Iterable[End]) -> Outcome | None:
    """The outcome of a failed attempt; None if no pod reported a failure."""
    failures = [end for end in ends if end.outcome.fault is not None]
    first = min(failures, key=lambda end: (_weight(end), end.at or _NEVER, end.index), default=None)
    return first.outcome if first is not None else None


def explain_success(ends: Iterable[End]) -> Outcome | None:
    """The outcome of a successful attempt: that of the pod which wrote the artifact."""
    successes = [end for end in ends if end.outcome.fault is None]
    writer = min(successes, key=lambda end: (end.outcome.artifact_digest is None, end.index), default=None)
    return writer.outcome if writer is not None else None


def _weight(end: End) -> int:
    weight = _WEIGHTS.get(end.outcome.fault, _OTHERS)
    return min(weight, _TAKEN) if end.taken else weight
