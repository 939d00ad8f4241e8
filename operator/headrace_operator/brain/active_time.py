"""How long a stage has worked: the time of its attempts, not the time between them. Pure.

A stage is active from the start of an attempt until the attempt ends or, for a server, until it answers.
"""

from datetime import datetime

from headrace_api.run import StageState, StageStatus
from headrace_operator.brain.observed import Observed

_ACTIVE = frozenset({StageState.STARTING, StageState.RUNNING, StageState.STOPPING})
"""Not while it waits for a node or a quota."""


def account(before: StageStatus, after: StageStatus, observed: Observed) -> StageStatus:
    """The new status with its active time, which begins and ends with attempts.

    Args:
        before: the status that the last plan left.
        after: the status as decided now, its times those of ``before``.
        observed: when attempts ended, and the time.
    """
    active = after.state in _ACTIVE
    goes_on = active and after.attempt == before.attempt and after.active_since is not None
    if not goes_on:
        ended_at = next((a.ended_at for a in observed.of_stage(before.name) if a.number == before.attempt), None)
        after = close(after, ended_at or observed.now)
    return after.model_copy(update={"active_since": observed.now}) if active and not goes_on else after


def close(status: StageStatus, ended_at: datetime) -> StageStatus:
    """The status with the attempt under way, if there is one, counted up to its end."""
    if status.active_since is None:
        return status
    seconds = status.active_seconds + max(0.0, (ended_at - status.active_since).total_seconds())
    return status.model_copy(update={"active_seconds": round(seconds, 3), "active_since": None})


def active_seconds(status: StageStatus, *, now: datetime) -> float:
    """How long the stage has worked so far, the attempt under way included."""
    return close(status, now).active_seconds
