"""The status that people read: conditions and the columns of ``kubectl get trun``. Pure."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from headrace_api.contract import Progress
from headrace_api.people import people_count, people_time
from headrace_api.run import (
    Condition,
    ConditionType,
    RunStatus,
    SavedCheckpoint,
    StageState,
    StageStatus,
    TrainingRun,
)
from headrace_operator.brain.observed import Observed

_LONGEST_NOTE = 1024
_NO_COLUMNS: dict[str, str | None] = dict.fromkeys(
    ("step", "progress", "loss", "tokens_per_second", "eta", "phase_message")
)


def report(
    run: TrainingRun, observed: Observed, stages: Sequence[StageStatus], *, notes: Mapping[str, str]
) -> RunStatus:
    """Build the run's status from those of its stages.

    Args:
        run: the manifest and the last status, whose conditions keep their transition times.
        observed: the newest progress, and the time.
        stages: the new stage statuses, in order.
        notes: stage name -> what it waits for; empty if the ranks' report says more.
    """
    current = next((s for s in stages if s.state is not StageState.SUCCEEDED), None)
    progress = _progress_of(observed, current)
    note = notes[current.name] if current is not None else next(filter(None, notes.values()), "")
    # A copy, so that fields written by a newer operator survive.
    return run.status.model_copy(
        update={
            "conditions": _conditions(run, current, now=observed.now),
            "observed_generation": run.metadata.generation,
            "summary": _summary(current),
            "stage": current.name if current is not None else stages[-1].name,
            "restarts": sum(s.infra_restarts + s.user_restarts for s in stages),
            "checkpoint": _checkpoint(run, current, progress),
            "endpoint": next((s.endpoint for s in stages if s.endpoint), None),
            "stages": list(stages),
            **_columns(run, current, progress, note=note),
        }
    )


def _progress_of(observed: Observed, current: StageStatus | None) -> Progress | None:
    if current is None:
        return None
    return next((a.progress for a in observed.of_stage(current.name) if a.number == current.attempt), None)


def _summary(current: StageStatus | None) -> str:
    if current is None:
        return "Complete"
    if current.state is StageState.PENDING and current.retry_at is not None:
        return "Restarting"
    return current.state.value


def _conditions(run: TrainingRun, current: StageStatus | None, *, now: datetime) -> list[Condition]:
    state = current.state if current is not None else None
    failed = current if state is StageState.FAILED else None
    truth = {
        ConditionType.COMPLETE: (current is None, "StagesSucceeded" if current is None else "StagesUnfinished", ""),
        ConditionType.FAILED: (
            failed is not None,
            (failed.reason if failed is not None else None) or "NoFailure",
            f"{failed.name}: {failed.message}" if failed is not None else "",
        ),
        ConditionType.SUSPENDED: (
            state is StageState.SUSPENDED,
            "SuspendRequested" if state is StageState.SUSPENDED else "NotSuspended",
            "",
        ),
    }
    before = {c.type: c for c in run.status.conditions}
    ours = [_condition(kind, *said, before.get(kind), now=now) for kind, said in truth.items()]
    return [*ours, *(c for c in run.status.conditions if c.type not in truth)]


def _condition(
    kind: ConditionType, holds: bool, reason: str, message: str, before: Condition | None, *, now: datetime
) -> Condition:
    status = "True" if holds else "False"
    since = before.last_transition_time if before is not None and before.status == status else now
    said = {"status": status, "reason": reason, "message": message, "last_transition_time": since}
    return before.model_copy(update=said) if before is not None else Condition.model_validate({"type": kind, **said})


def _checkpoint(run: TrainingRun, current: StageStatus | None, progress: Progress | None) -> SavedCheckpoint | None:
    if current is None:
        return None
    if progress is not None and progress.checkpoint is not None:
        return progress.checkpoint
    return run.status.checkpoint if run.status.stage == current.name else None


def _columns(
    run: TrainingRun, current: StageStatus | None, progress: Progress | None, *, note: str
) -> dict[str, str | None]:
    """The progress columns. Step and loss survive until a new attempt reports."""
    before, said = run.status, note[:_LONGEST_NOTE] or None
    if progress is None and current is None:
        return {**_NO_COLUMNS, "loss": before.loss, "phase_message": said}
    if progress is None:
        kept = {"step": before.step, "progress": before.progress, "loss": before.loss}
        same = current is not None and before.stage == current.name
        return {**_NO_COLUMNS, **(kept if same else {}), "phase_message": said}
    columns = progress_columns(progress)
    return columns | {"phase_message": said or columns["phase_message"]}


def progress_columns(progress: Progress) -> dict[str, str | None]:
    """The status fields that show an attempt's progress."""
    total, speed, eta = progress.total, progress.tokens_per_second, progress.eta_seconds
    return {
        "step": f"{progress.done}/{total}" if total else str(progress.done),
        "progress": f"{100 * min(progress.done, total) // total}%" if total else None,
        "loss": f"{progress.loss:.4f}" if progress.loss is not None else None,
        "tokens_per_second": people_count(speed) if speed is not None else None,
        "eta": people_time(eta) if eta is not None else None,
        "phase_message": f"{progress.phase}: {progress.message}" if progress.message else progress.phase,
    }
