"""``plan(run, observed)`` makes every decision about a run. Pure; its only clock is ``observed.now``.

Level-triggered: the plan lists what should exist now, so a lost event, a replay or a restart of the body does no
harm. ``stage_plan`` decides about one stage; ``report`` builds the status that people read.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from headrace_api.contract import ResolvedStage
from headrace_api.people import people_count
from headrace_api.run import ConditionType, RunStatus, StageState, StageStatus, TrainingRun
from headrace_operator.brain.active_time import account
from headrace_operator.brain.decision import StagePlan
from headrace_operator.brain.observed import LIVE, Attempt, Observed
from headrace_operator.brain.report import report
from headrace_operator.brain.stage_plan import plan_stage

_KEPT_ATTEMPTS = 3
"""Finished attempts per stage whose objects, and therefore logs, are kept."""
_SHORTEST_WAIT_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, order=True)
class AttemptKey:
    """Identifies an attempt."""

    stage: str
    number: int
    uid: str = ""
    """uid of its Job or Deployment; empty matches any."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A state change worth telling people about."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The desired state of a run.

    A body writes ``status`` before it carries out ``start``. The status is the intent: an attempt that it names but that
    nobody has seen is started again under the same number.
    """

    start: tuple[ResolvedStage, ...]
    """Attempts that should exist. They stay listed while they run; starting one again is a no-op."""
    stop: tuple[AttemptKey, ...]
    """Attempts that should end: their pods save, exit and are removed."""
    status: RunStatus
    events: tuple[Event, ...] = ()
    requeue_after_seconds: float | None = None
    """When to plan again even if nothing changes."""


def plan(run: TrainingRun, observed: Observed) -> Plan:
    """Decide what to do about a run.

    Args:
        run: the manifest, with the status from the last plan.
        observed: what the body observes.
    """
    if run.metadata.deletion_timestamp is not None:
        return Plan(start=(), stop=_keys(observed.attempts), status=run.status)
    stages = _plan_stages(run, observed)
    statuses = [s.status for s in stages]
    known = {stage.name for stage in run.spec.stages}
    strangers = _keys(a for a in observed.attempts if a.stage not in known)
    status = report(run, observed, statuses, notes={s.status.name: s.note for s in stages})
    life = _seconds_to_live(run, status, now=observed.now)
    old = _old(observed, kept=0 if life == 0 else _KEPT_ATTEMPTS)
    return Plan(
        start=tuple(s.start for s in stages if s.start is not None),
        stop=tuple(dict.fromkeys([*strangers, *_keys(a for s in stages for a in s.stop), *old])),
        status=status,
        events=tuple(e for before, after in zip(_prior(run), stages, strict=True) for e in _events(before, after)),
        requeue_after_seconds=_first([life or None, *(s.requeue_after_seconds for s in stages)]),
    )


def _plan_stages(run: TrainingRun, observed: Observed) -> list[StagePlan]:
    """One plan per stage, in order. A stage whose inputs are not ready waits, and its attempts are stopped."""
    plans: list[StagePlan] = []
    for stage, before in zip(run.spec.stages, _prior(run), strict=True):
        ready = all(p.done for p in plans)
        finished = {p.status.name: p.status.artifact for p in plans if p.status.artifact is not None}
        decided = plan_stage(run, stage, before, observed, ready=ready, finished=finished)
        plans.append(replace(decided, status=account(before, decided.status, observed)))
    return plans


def _first(seconds: Iterable[float | None]) -> float | None:
    """The earliest time to plan again. Never at once: the timer may run slightly ahead of the clock that set it."""
    return max(_SHORTEST_WAIT_SECONDS, min(known)) if (known := [s for s in seconds if s is not None]) else None


def _prior(run: TrainingRun) -> list[StageStatus]:
    known = {s.name: s for s in run.status.stages}
    return [known.get(stage.name, StageStatus(name=stage.name)) for stage in run.spec.stages]


def _keys(attempts: Iterable[Attempt]) -> tuple[AttemptKey, ...]:
    return tuple(AttemptKey(stage=a.stage, number=a.number, uid=a.uid) for a in attempts)


def _old(observed: Observed, *, kept: int) -> tuple[AttemptKey, ...]:
    """Finished attempts beyond the newest ``kept`` of each stage."""
    newest = [a for stage in {a.stage for a in observed.attempts} for a in observed.of_stage(stage)[::-1][:kept]]
    return _keys(a for a in observed.attempts if a not in newest and a.state not in LIVE)


def _seconds_to_live(run: TrainingRun, status: RunStatus, *, now: datetime) -> float | None:
    """How long a finished run's objects are still kept; None if it has not finished, or has no TTL."""
    ttl, ends = run.spec.ttl_seconds_after_finished, (ConditionType.COMPLETE, ConditionType.FAILED)
    finished = [c.last_transition_time for c in status.conditions if c.type in ends and c.status == "True"]
    if ttl is None or not finished:
        return None
    return max(0.0, (max(finished) + timedelta(seconds=ttl) - now).total_seconds())


def _events(before: StageStatus, plan: StagePlan) -> list[Event]:
    """The transitions that people want to know about."""
    after = plan.status
    name, events = after.name, []
    if after.infra_restarts + after.user_restarts > before.infra_restarts + before.user_restarts:
        events.append(
            Event(type="Warning", reason="AttemptFailed", message=f"{name}: attempt {before.attempt}: {after.message}")
        )
    if after.attempt != before.attempt:
        events.append(Event(type="Normal", reason="AttemptStarted", message=f"{name}: attempt {after.attempt}"))
    if after.state is before.state:
        return events
    if after.state is StageState.SUCCEEDED:
        events.append(Event(type="Normal", reason="StageSucceeded", message=f"{name}: {_figures(after)}"))
    elif after.state is StageState.FAILED:
        events.append(Event(type="Warning", reason="StageFailed", message=f"{name}: {after.reason}: {after.message}"))
    elif after.state is StageState.STOPPING and plan.note:
        events.append(Event(type="Normal", reason="AttemptStopping", message=f"{name}: {plan.note}"))
    elif after.state is StageState.SUSPENDED:
        events.append(Event(type="Normal", reason="StageSuspended", message=f"{name}: after attempt {after.attempt}"))
    return events


def _figures(status: StageStatus) -> str:
    if status.endpoint:
        return f"serving at {status.endpoint}"
    return ", ".join(f"{k}={_figure(v)}" for k, v in sorted(status.metrics.items())) or "done"


def _figure(value: float) -> str:
    return people_count(value) if abs(value) >= 1000 else f"{value:.4g}"
