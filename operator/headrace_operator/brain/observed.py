"""The world as plain values: what a body saw, for ``plan`` to decide on.

A body (the cluster's, or the local one) fills an ``Observed``; nothing here or in ``plan`` does I/O.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from headrace_api.contract import Progress
from headrace_api.faults import Outcome


class AttemptState(StrEnum):
    """Where an attempt is, pods taken together."""

    PENDING = "Pending"
    """It exists, and not all of its pods run yet."""
    RUNNING = "Running"
    STOPPING = "Stopping"
    """It was told to stop, or has failed, and some of its pods are not gone yet."""
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


LIVE = frozenset({AttemptState.PENDING, AttemptState.RUNNING, AttemptState.STOPPING})
"""States in which an attempt still holds machines."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a stage."""

    stage: str
    number: int
    """Counts from 1."""
    hash: str
    """The stage_hash that it was started for."""
    state: AttemptState
    outcome: Outcome | None = None
    """What it said at its end; None while it runs, or where that was lost."""
    progress: Progress | None = None


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Everything that a decision may depend on, besides the run itself."""

    now: datetime
    attempts: tuple[Attempt, ...] = ()

    def of_stage(self, stage: str) -> tuple[Attempt, ...]:
        """The attempts at a stage, by number."""
        return tuple(sorted((a for a in self.attempts if a.stage == stage), key=lambda a: a.number))
