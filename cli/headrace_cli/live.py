"""The current state of a run: its stored status, corrected by which processes are alive.

``status.json`` was true when ``headrace run`` last wrote it. That command, its agents or the whole machine may have
died since.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from headrace_api.run import Condition, ConditionType, RunStatus, StageState, StageStatus
from headrace_cli.attempts import LocalAttempts
from headrace_cli.home import Outline, RunFolder
from headrace_operator.brain.active_time import close
from headrace_operator.brain.observed import LIVE, Attempt
from headrace_operator.brain.report import progress_columns

INTERRUPTED = "Interrupted"
"""The summary of a run that has no process although nobody stopped it."""
_STILL = frozenset({StageState.PENDING, StageState.SUSPENDED, StageState.SUCCEEDED, StageState.FAILED})
"""States without a running attempt."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A run, seen from outside."""

    outline: Outline
    status: RunStatus
    attended: bool
    """Whether a headrace process is running it."""
    live: tuple[Attempt, ...]
    """Attempts with a live process."""


def look(folder: RunFolder) -> Seen:
    """Look at a run. Changes nothing.

    Raises:
        Damaged: its status is unreadable.
    """
    attended = folder.holder() is not None
    attempts = LocalAttempts(folder=folder.attempts).observe()
    stored = folder.status()
    return Seen(
        outline=folder.outline(),
        status=stored if attended else as_it_is(stored, attempts, now=datetime.now(UTC), rest=Rest.INTERRUPTED),
        attended=attended,
        live=tuple(a for a in attempts if a.state in LIVE),
    )


class Rest(Enum):
    """Why a run has no process."""

    INTERRUPTED = "no process is running it, and nobody stopped it"
    STOPPED = "stopped on request"


def as_it_is(stored: RunStatus, attempts: Sequence[Attempt], *, now: datetime, rest: Rest) -> RunStatus:
    """The true status of a run that no headrace process is running. Pure.

    Args:
        stored: the status that its process last wrote.
        attempts: the current attempts, whose agents may still run or have finished since.
        now: the current time.
        rest: what to call a run that was under way and has no process left.
    """
    stages = [_stage(s, attempts, now=now) for s in stored.stages]
    found = {"stages": stages, "endpoint": next((s.endpoint for s in stages if s.endpoint), None)}
    at_rest = any(stored.condition(kind) for kind in ConditionType)
    current = next((s for s in stages if s.state is not StageState.SUCCEEDED), None)
    if (at_rest and stages == stored.stages) or (current is not None and current.state is StageState.FAILED):
        return stored.model_copy(update=found)
    attempt = _newest(current, attempts) if current is not None else None
    if attempt is not None and attempt.state in LIVE:
        return stored.model_copy(update=found | _how_far(stored, attempt))
    resting = [_resting(s, rest) if s is current else s for s in stages]
    speed = {"tokens_per_second": None, "eta": None, "phase_message": None}
    update = {
        "conditions": _conditions(stored, rest, now=now),
        "summary": StageState.SUSPENDED.value if rest is Rest.STOPPED else INTERRUPTED,
        "stage": current.name if current is not None else stored.stage,
        "stages": resting,
    }
    return stored.model_copy(update=found | _how_far(stored, attempt) | speed | update)


def _newest(status: StageStatus, attempts: Sequence[Attempt]) -> Attempt | None:
    return next((a for a in attempts if (a.stage, a.number) == (status.name, status.attempt)), None)


def _stage(status: StageStatus, attempts: Sequence[Attempt], *, now: datetime) -> StageStatus:
    """The stage, marked suspended if its status says that it works or serves but its attempt has no live process."""
    attempt, endpoint = _newest(status, attempts), _endpoint(status, attempts)
    lives = attempt is not None and attempt.state in LIVE
    if lives or (status.state in _STILL and status.endpoint == endpoint):
        return status
    if status.state is StageState.FAILED:
        return status.model_copy(update={"endpoint": endpoint})
    ended_at = attempt.ended_at if attempt is not None else None
    return close(status, ended_at or now).model_copy(
        update={"state": StageState.SUSPENDED, "endpoint": endpoint, "retry_at": None, "finished_at": None}
    )


def _endpoint(status: StageStatus, attempts: Sequence[Attempt]) -> str | None:
    """Where the stage's model answers. An older server stays up until the next one answers."""
    live = [a for a in attempts if a.stage == status.name and a.state in LIVE and a.progress is not None]
    newest = sorted(live, key=lambda a: a.number, reverse=True)
    return next((a.progress.endpoint for a in newest if a.progress is not None and a.progress.endpoint), None)


def _resting(status: StageStatus, rest: Rest) -> StageStatus:
    """The stage at which the run rests. Like a suspend by the planner, a stop on request charges no budget."""
    status = status.model_copy(update={"state": StageState.SUSPENDED, "retry_at": None})
    if rest is Rest.INTERRUPTED:
        return status
    return status.model_copy(update={"settled": status.attempt, "infra_spent": 0, "user_spent": 0})


def _how_far(stored: RunStatus, attempt: Attempt | None) -> dict[str, object]:
    """Progress reported after the status was written."""
    progress = attempt.progress if attempt is not None else None
    if attempt is None or progress is None:
        return {}
    kept = stored.checkpoint if stored.stage == attempt.stage else None
    return progress_columns(progress) | {"checkpoint": progress.checkpoint or kept}


def _conditions(stored: RunStatus, rest: Rest, *, now: datetime) -> list[Condition]:
    reason = "SuspendRequested" if rest is Rest.STOPPED else INTERRUPTED
    return [
        Condition(
            type=kind,
            status="True" if kind is ConditionType.SUSPENDED else "False",
            reason=reason,
            message=rest.value if kind is ConditionType.SUSPENDED else "",
            last_transition_time=now,
        )
        for kind in ConditionType
    ]
