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
    """All of its pods run; whether their ranks have joined is for their report to say."""
    STOPPING = "Stopping"
    """It was told to stop, or has failed, and some of its pods are not gone yet."""
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


LIVE = frozenset({AttemptState.PENDING, AttemptState.RUNNING, AttemptState.STOPPING})
"""States in which an attempt still holds machines."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What keeps an attempt's pods from running."""

    reason: str
    """One CamelCase word."""
    message: str
    since: datetime | None = None
    """Since when a node tries in vain to start a container; None while the pod waits for a node, which takes any time."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An attempt that could not be started."""

    stage: str
    number: int
    outcome: Outcome
    """Why; CAPACITY is waited for, anything else is a failure."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a stage."""

    stage: str
    number: int
    """Counts from 1."""
    hash: str
    """The stage_hash that it was started for."""
    digest: str = ""
    """ResolvedStage.digest of what it was started with; empty if unknown."""
    state: AttemptState
    uid: str = ""
    """Of its Job or Deployment: an attempt with another one is another, whatever its number. Empty if unknown."""
    outcome: Outcome | None = None
    """What it said at its end; None while it runs, where that was lost, and until it is seen."""
    progress: Progress | None = None
    held: Held | None = None
    """What keeps it from running, where the body can tell."""
    missing: str = ""
    """What is missing before all of its pods run, for people; empty once they do."""
    ended_at: datetime | None = None
    """When its last process ended, where the body knows: that may be long before anybody looks."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Everything that a decision may depend on, besides the run itself."""

    now: datetime
    attempts: tuple[Attempt, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    def of_stage(self, stage: str) -> tuple[Attempt, ...]:
        """The attempts at a stage, by number."""
        return tuple(sorted((a for a in self.attempts if a.stage == stage), key=lambda a: a.number))

    def refusal(self, stage: str, number: int) -> Outcome | None:
        """Why an attempt could not be started; None if nothing is known against it."""
        return next((r.outcome for r in self.refusals if (r.stage, r.number) == (stage, number)), None)
