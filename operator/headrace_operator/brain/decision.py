"""What deciding about a stage comes to, and what all stages share of it. Pure.

``stage_plan`` chooses: ``work_plan`` is about stages that end by themselves, ``service_plan`` about servers. The status
follows its newest attempt until that is *settled*: charged to a budget, or stopped on request. Whatever is seen of a
settled attempt later, a replay or a ghost, costs nothing more.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from headrace_api.artifact import ArtifactRef
from headrace_api.contract import STARTING_PHASE, ResolvedStage, join_uri
from headrace_api.faults import FaultClass, Outcome
from headrace_api.run import Stage, StageState, StageStatus, TrainingRun
from headrace_operator.brain.budgets import (
    LONGEST_WAIT_SECONDS,
    charge,
    has_advanced,
    step_of,
    wait_seconds,
    with_fresh_budgets,
)
from headrace_operator.brain.observed import LIVE, Attempt, AttemptState, Observed

POLL_SECONDS = 5.0
_CAPACITY_SECONDS = (15.0, 300.0)
"""How often a start that was refused for want of room is tried again: after a tenth of the time that it has waited."""
_START_SECONDS = 600.0
"""How long a node may try to start a container, as one whose image it cannot pull, while the gang's other nodes idle."""
_VANISHED = Outcome(fault=FaultClass.POD, reason="Vanished", message="the attempt is gone, and no pod is left to ask")


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What should be true of one stage."""

    status: StageStatus
    done: bool = False
    """Whether the next stage may begin."""
    start: ResolvedStage | None = None
    stop: tuple[Attempt, ...] = ()
    requeue_after_seconds: float | None = None
    note: str = ""
    """What it waits for, for people; empty where the ranks' own report says more."""


@dataclass(frozen=True, kw_only=True)
class Decision(ABC):
    """One stage whose turn it is, with everything a decision needs."""

    run: TrainingRun
    stage: Stage
    inputs: Mapping[str, ArtifactRef]
    hash: str
    attempts: tuple[Attempt, ...]
    observed: Observed

    @abstractmethod
    def is_done(self, status: StageStatus) -> bool:
        """Whether nothing is left to do about the stage."""

    @abstractmethod
    def wait(self, before: StageStatus) -> StagePlan:
        """Deal with a stage whose turn has not come, or has gone again because a stage before it is made again."""

    @abstractmethod
    def suspend(self, status: StageStatus) -> StagePlan:
        """Stop, and stay stopped; a failed stage gets its budgets back, so that resuming tries again."""

    @abstractmethod
    def give_up(self, status: StageStatus) -> StagePlan:
        """Leave a stage that has failed as it is, but for what it still holds."""

    def advance(self, status: StageStatus) -> StagePlan:
        """Start, keep, restart or finish the stage."""
        current = self.newest(status) if follows(status) else None
        if current is not None and current.uid:
            status = updated(status, workload=current.uid)
        elif current is None and follows(status) and status.workload is not None:
            return self.charge(status, _VANISHED)
        if others := self.in_the_way(current):
            return self.make_way(status, others)
        refusal = self.observed.refusal(self.stage.name, status.attempt) if follows(status) else None
        if refusal is not None and refusal.fault is not FaultClass.CAPACITY:
            return self.charge(status, refusal)
        if current is None:
            return self.start_next(status, refusal)
        if current.state is AttemptState.STOPPING:
            return self.stop(status, ())
        if current.state in LIVE:
            return self._follow(status, current, refusal)
        return self.ended(status, current)

    @abstractmethod
    def in_the_way(self, current: Attempt | None) -> tuple[Attempt, ...]:
        """The attempts that must be gone before another one may start."""

    @abstractmethod
    def replace(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Apply an edit. A running attempt is never changed: the next one is."""

    @abstractmethod
    def keep(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Say where a stage is whose attempt lives, and should."""

    @abstractmethod
    def ended(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Deal with the end of the attempt."""

    def _follow(self, status: StageStatus, current: Attempt, refusal: Outcome | None) -> StagePlan:
        if self.edited(status, digest=current.digest):
            return self.replace(settled(status), current)
        held, left = current.held, None
        if held is not None and held.since is not None:
            due = held.since + timedelta(seconds=_START_SECONDS)
            if due <= self.observed.now:
                return self.charge(status, Outcome(fault=FaultClass.POD, reason=held.reason, message=held.message))
            left = seconds_until(due, now=self.observed.now)
        if has_advanced(status, step=step_of(current), policy=self.run.spec.restart_policy):
            status = with_fresh_budgets(status)
        kept = self.keep(updated(status, generation=self.run.metadata.generation), current)
        plan = replace(kept, start=self.resolved(current.number), requeue_after_seconds=left)
        return self._with_refusal(plan, refusal)

    def live(self, *, besides: Attempt | None = None) -> tuple[Attempt, ...]:
        """The attempts that hold machines."""
        return tuple(a for a in self.attempts if a.state in LIVE and a != besides)

    def newest(self, status: StageStatus) -> Attempt | None:
        """The newest attempt, if it was started for this hash, and is the one that was seen before."""
        same = (a for a in self.attempts if a.number == status.attempt and a.hash == self.hash)
        return next((a for a in same if status.workload in (None, a.uid) or not a.uid), None)

    def edited(self, status: StageStatus, *, digest: str | None) -> bool:
        """Whether the user wants another attempt than one that was resolved to ``digest``.

        The spec's generation decides that there was an edit at all: another version of the planner may resolve the same
        spec to another digest, and leaves what runs alone.
        """
        generation = self.run.metadata.generation
        same = generation is not None and status.generation == generation
        return not same and bool(digest) and digest != self.resolved(1).digest

    def stop(self, status: StageStatus, attempts: tuple[Attempt, ...], *, then: str = "") -> StagePlan:
        """Wait for attempts to end, having asked them to if that has not happened by itself."""
        numbers = " and ".join(str(n) for n in sorted({a.number for a in attempts}))
        return StagePlan(
            status=updated(status, state=StageState.STOPPING),
            stop=attempts,
            requeue_after_seconds=POLL_SECONDS,
            note=f"Stopping: attempt {numbers} saves and ends{then}" if attempts else "",
        )

    def make_way(self, status: StageStatus, attempts: tuple[Attempt, ...]) -> StagePlan:
        """End attempts that are not wanted any more, at no cost."""
        edited = status.generation != self.run.metadata.generation
        return self.stop(status, attempts, then="; the next one applies the edited spec" if edited else "")

    def start_next(self, status: StageStatus, refusal: Outcome | None = None) -> StagePlan:
        """Start the attempt that the status names and nobody has seen, or else the one after it, once its time has come."""
        now = self.observed.now
        if status.retry_at is not None and status.retry_at > now:
            # A time beyond the longest wait was written by another clock.
            due = min(status.retry_at, now + timedelta(seconds=LONGEST_WAIT_SECONDS))
            return StagePlan(
                status=updated(status, retry_at=due),
                requeue_after_seconds=seconds_until(due, now=now),
                note=f"Restarting: {status.reason}: {status.message}",
            )
        if not follows(status):
            return self._start(status, number=max([status.attempt, *(a.number for a in self.attempts)]) + 1)
        if any(a.number == status.attempt for a in self.attempts):
            return self.charge(status, _VANISHED)  # what has its number is not it
        return self._with_refusal(self._start(status, number=status.attempt), refusal)

    def _start(self, status: StageStatus, *, number: int) -> StagePlan:
        resolved = self.resolved(number)
        status = updated(
            status,
            state=StageState.STARTING,
            attempt=number,
            generation=self.run.metadata.generation,
            digest=resolved.digest,
            workload=None,
            started_at=status.started_at or self.observed.now,
            finished_at=None,
            retry_at=None,
            outcome_due_at=None,
            endpoint=self.endpoint_meanwhile(status),
        )
        return StagePlan(status=status, start=resolved)

    def endpoint_meanwhile(self, status: StageStatus) -> str | None:
        """Where a server answers until the next attempt does."""
        return None

    def _with_refusal(self, plan: StagePlan, refusal: Outcome | None) -> StagePlan:
        if refusal is None:
            return plan
        started, (shortest, longest) = plan.status.started_at or self.observed.now, _CAPACITY_SECONDS
        again = min(max((self.observed.now - started).total_seconds() / 10, shortest), longest)
        return replace(
            plan,
            status=updated(plan.status, state=StageState.WAITING),
            requeue_after_seconds=again,
            note=f"Waiting: {refusal.reason}: {refusal.message}",
        )

    def charge(self, status: StageStatus, outcome: Outcome) -> StagePlan:
        """Charge a failure to its budget; try again within it, fail beyond it. What is in the way ends first."""
        policy, step = self.run.spec.restart_policy, max(outcome.step or 0, step_of(self.newest(status)))
        if has_advanced(status, step=step, policy=policy):
            status = with_fresh_budgets(status)
        endpoint = self.endpoint_meanwhile(status)
        status = settled(status, failed_step=max(status.failed_step, step), retry_at=None, endpoint=endpoint)
        status, within = charge(status, outcome, policy=policy)
        if not within:
            return self.give_up(updated(status, state=StageState.FAILED, finished_at=self.observed.now))
        wait, stop = wait_seconds(status), self.in_the_way(None)
        if wait == 0 and not stop:
            return self.start_next(status)
        retry_at = self.observed.now + timedelta(seconds=wait)
        return StagePlan(
            status=updated(status, state=StageState.PENDING, retry_at=retry_at),
            stop=stop,
            requeue_after_seconds=max(wait, POLL_SECONDS if stop else 0.0),
            note=f"Restarting: {status.reason}: {status.message}",
        )

    def folder(self) -> str:
        """Where the stage leaves its result."""
        assert self.run.spec.storage.uri is not None, "a body fills in storage.uri before it plans"
        return join_uri(self.run.spec.storage.uri, self.stage.name)

    def resolved(self, number: int) -> ResolvedStage:
        """What an attempt of this number is told."""
        return ResolvedStage(
            run=self.run.metadata.name,
            namespace=self.run.metadata.namespace,
            run_uid=self.run.metadata.uid,
            runtime=self.run.spec.runtime,
            stage=self.stage,
            attempt=number,
            seed=self.run.spec.seed,
            hash=self.hash,
            inputs=dict(self.inputs),
            storage=self.run.spec.storage,
            output_uri=self.folder(),
            on_stall=self.run.spec.restart_policy.on_stall,
        )


def state_of(attempt: Attempt, *, before: StageState) -> StageState:
    """Where a stage is whose attempt lives. One that was seen to run goes on running: reports are lost with a leader."""
    if attempt.held is not None:
        return StageState.WAITING
    phase = attempt.progress.phase if attempt.progress is not None else STARTING_PHASE
    joined = before is StageState.RUNNING or phase != STARTING_PHASE
    return StageState.RUNNING if attempt.state is AttemptState.RUNNING and joined else StageState.STARTING


def note_on(attempt: Attempt, state: StageState) -> str:
    """What a stage waits for whose attempt lives."""
    if attempt.held is not None:
        return f"Waiting: {attempt.held.reason}: {attempt.held.message}"
    if state is not StageState.STARTING or (attempt.progress is not None and attempt.progress.message):
        return ""
    return f"Starting: {attempt.missing or 'its ranks have not joined yet'}"


def follows(status: StageStatus) -> bool:
    """Whether the newest attempt's end is still to be dealt with."""
    return status.attempt > status.settled


def settled(status: StageStatus, **changes: object) -> StageStatus:
    """The status, its newest attempt dealt with."""
    return updated(status, settled=status.attempt, **changes)


def updated(status: StageStatus, **changes: object) -> StageStatus:
    """The status with changes."""
    return status.model_copy(update=changes)


def seconds_until(due: datetime, *, now: datetime) -> float:
    """The time until a deadline; 0 if it has passed."""
    return max(0.0, (due - now).total_seconds())
