"""The observed state as plain values: the input of ``plan``.

Each body, cluster or local, fills an ``Observed``. Nothing here or in ``plan`` does I/O.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from headrace_api.contract import Progress
from headrace_api.faults import Outcome


class AttemptState(StrEnum):
    """The state of an attempt, over all of its pods."""

    PENDING = "Pending"
    """It exists, but not all of its pods run yet."""
    RUNNING = "Running"
    """All of its pods run. Whether the ranks have joined is up to their report."""
    STOPPING = "Stopping"
    """It was told to stop, or has failed, and some of its pods still exist."""
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


LIVE = frozenset({AttemptState.PENDING, AttemptState.RUNNING, AttemptState.STOPPING})
"""States in which an attempt holds machines."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Why an attempt's pods do not run yet."""

    reason: str
    """In CamelCase."""
    message: str
    since: datetime | None = None
    """Since when a node has failed to start a container; None while the pod waits for a node, however long."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An attempt that the cluster refused to start."""

    stage: str
    number: int
    outcome: Outcome
    """Why. CAPACITY is waited for; anything else is a failure."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a stage."""

    stage: str
    number: int
    """From 1."""
    hash: str
    """The stage_hash it was started for."""
    digest: str = ""
    """ResolvedStage.digest it was started with; empty if unknown."""
    state: AttemptState
    uid: str = ""
    """uid of its Job or Deployment; empty if unknown. The same number under another uid is another attempt."""
    outcome: Outcome | None = None
    """Its outcome; None while it runs, until it is observed, or if it was lost."""
    progress: Progress | None = None
    held: Held | None = None
    """Why it does not run yet, if the body can tell."""
    missing: str = ""
    """What is missing until all of its pods run, for people; empty once they do."""
    ended_at: datetime | None = None
    """When its last process ended, if the body knows. May be long before anybody looks."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Everything a decision may depend on besides the run itself."""

    now: datetime
    attempts: tuple[Attempt, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    def of_stage(self, stage: str) -> tuple[Attempt, ...]:
        """The attempts at a stage, ordered by number."""
        return tuple(sorted((a for a in self.attempts if a.stage == stage), key=lambda a: a.number))

    def refusal(self, stage: str, number: int) -> Outcome | None:
        """Why an attempt could not start; None if it was not refused."""
        return next((r.outcome for r in self.refusals if (r.stage, r.number) == (stage, number)), None)
