"""Active time of a stage: time spent in attempts, not between them. Pure.

An attempt is active from its start until it ends; a server's, until the server answers.
"""

from datetime import datetime

from headrace_api.run import StageState, StageStatus
from headrace_operator.brain.observed import Observed

_ACTIVE = frozenset({StageState.STARTING, StageState.RUNNING, StageState.STOPPING})
"""Waiting for a node or for quota does not count."""


def account(before: StageStatus, after: StageStatus, observed: Observed) -> StageStatus:
    """Update the active time of ``after``.

    Args:
        before: the status from the last plan.
        after: the newly decided status, with the times of ``before``.
        observed: the current time, and when attempts ended.
    """
    active = after.state in _ACTIVE
    goes_on = active and after.attempt == before.attempt and after.active_since is not None
    if not goes_on:
        ended_at = next((a.ended_at for a in observed.of_stage(before.name) if a.number == before.attempt), None)
        after = close(after, ended_at or observed.now)
    return after.model_copy(update={"active_since": observed.now}) if active and not goes_on else after


def close(status: StageStatus, ended_at: datetime) -> StageStatus:
    """The status with its running attempt, if any, counted up to ``ended_at``."""
    if status.active_since is None:
        return status
    seconds = status.active_seconds + max(0.0, (ended_at - status.active_since).total_seconds())
    return status.model_copy(update={"active_seconds": round(seconds, 3), "active_since": None})


def active_seconds(status: StageStatus, *, now: datetime) -> float:
    """Active time so far, including the running attempt."""
    return close(status, now).active_seconds
