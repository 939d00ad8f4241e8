"""The decision about one stage, and the logic shared by all stages. Pure.

``work_plan`` covers stages that run to completion, ``service_plan`` servers; ``stage_plan`` picks one. The status
follows its newest attempt until that attempt is *settled*: charged to a budget, or stopped on request. A settled
attempt is never charged again, whatever a stale watch shows of it later.
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
"""Bounds of the delay before a start refused for lack of capacity is retried: a tenth of the time waited so far."""
_START_SECONDS = 600.0
"""How long a node may fail to start a container (an image it cannot pull, say) while the rest of the gang idles."""
_VANISHED = Outcome(fault=FaultClass.POD, reason="Vanished", message="the attempt and all of its pods are gone")


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The desired state of one stage."""

    status: StageStatus
    done: bool = False
    """Whether the next stage may start."""
    start: ResolvedStage | None = None
    stop: tuple[Attempt, ...] = ()
    requeue_after_seconds: float | None = None
    note: str = ""
    """What the stage waits for, for people; empty if the ranks' own report says more."""


@dataclass(frozen=True, kw_only=True)
class Decision(ABC):
    """The inputs of a decision about one stage."""

    run: TrainingRun
    stage: Stage
    inputs: Mapping[str, ArtifactRef]
    hash: str
    attempts: tuple[Attempt, ...]
    observed: Observed

    @abstractmethod
    def is_done(self, status: StageStatus) -> bool:
        """Whether the stage needs nothing more."""

    @abstractmethod
    def wait(self, before: StageStatus) -> StagePlan:
        """Plan a stage that cannot run because an earlier stage is not done (or is being rerun)."""

    @abstractmethod
    def suspend(self, status: StageStatus) -> StagePlan:
        """Stop the stage and keep it stopped. Resets its budgets, so that resuming retries a failed stage."""

    @abstractmethod
    def give_up(self, status: StageStatus) -> StagePlan:
        """Keep a failed stage failed; release what it still holds."""

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
        """Attempts that must be gone before another may start."""

    @abstractmethod
    def replace(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Apply an edit: replace the running attempt, never change it."""

    @abstractmethod
    def keep(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Update the status of a stage whose attempt is live and wanted."""

    @abstractmethod
    def ended(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Handle the end of the attempt."""

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
        """Attempts that still hold machines."""
        return tuple(a for a in self.attempts if a.state in LIVE and a != besides)

    def newest(self, status: StageStatus) -> Attempt | None:
        """The newest attempt, if it has this hash and is the object seen before."""
        same = (a for a in self.attempts if a.number == status.attempt and a.hash == self.hash)
        return next((a for a in same if status.workload in (None, a.uid) or not a.uid), None)

    def edited(self, status: StageStatus, *, digest: str | None) -> bool:
        """Whether an edit asks for a different attempt than the one resolved to ``digest``.

        Only a new generation of the spec counts as an edit. A different planner version may resolve the same spec to
        another digest; that leaves running attempts alone.
        """
        generation = self.run.metadata.generation
        same = generation is not None and status.generation == generation
        return not same and bool(digest) and digest != self.resolved(1).digest

    def stop(self, status: StageStatus, attempts: tuple[Attempt, ...], *, then: str = "") -> StagePlan:
        """Stop attempts and wait for them to end."""
        numbers = " and ".join(str(n) for n in sorted({a.number for a in attempts}))
        return StagePlan(
            status=updated(status, state=StageState.STOPPING),
            stop=attempts,
            requeue_after_seconds=POLL_SECONDS,
            note=f"Stopping: attempt {numbers} saves and exits{then}" if attempts else "",
        )

    def make_way(self, status: StageStatus, attempts: tuple[Attempt, ...]) -> StagePlan:
        """Stop attempts that are no longer wanted, without charging a budget."""
        edited = status.generation != self.run.metadata.generation
        return self.stop(status, attempts, then="; the next one applies the edited spec" if edited else "")

    def start_next(self, status: StageStatus, refusal: Outcome | None = None) -> StagePlan:
        """Start the attempt named in the status if nobody has seen it, else the one after it; honours the back-off."""
        now = self.observed.now
        if status.retry_at is not None and status.retry_at > now:
            # Later than the longest back-off: written by another clock.
            due = min(status.retry_at, now + timedelta(seconds=LONGEST_WAIT_SECONDS))
            return StagePlan(
                status=updated(status, retry_at=due),
                requeue_after_seconds=seconds_until(due, now=now),
                note=f"Restarting: {status.reason}: {status.message}",
            )
        if not follows(status):
            return self._start(status, number=max([status.attempt, *(a.number for a in self.attempts)]) + 1)
        if any(a.number == status.attempt for a in self.attempts):
            return self.charge(status, _VANISHED)  # another object has its number
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
        """The address that still answers until the next attempt does."""
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
        """Charge a failure to its budget: retry, or fail once it is spent. Live attempts are stopped first."""
        policy, step = self.run.spec.restart_policy, max(outcome.step or 0, step_of(self.newest(status)))
        if has_advanced(status, step=step, policy=policy):
            status = with_fresh_budgets(status)
        endpoint = self.endpoint_meanwhile(status)
        status = settled(status, failed_step=max(status.failed_step, step), endpoint=endpoint)
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
            requeue_after_seconds=max(wait, POLL_SECONDS) if stop else wait,
            note=f"Restarting: {status.reason}: {status.message}",
        )

    def folder(self) -> str:
        """Where the stage writes its artifact."""
        assert self.run.spec.storage.uri is not None, "the body sets storage.uri before it plans"
        return join_uri(self.run.spec.storage.uri, self.stage.name)

    def resolved(self, number: int) -> ResolvedStage:
        """The resolved stage that attempt ``number`` runs."""
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
    """The state of a stage with a live attempt. Once Running it stays Running: a new leader has no reports yet."""
    if attempt.held is not None:
        return StageState.WAITING
    phase = attempt.progress.phase if attempt.progress is not None else STARTING_PHASE
    joined = before is StageState.RUNNING or phase != STARTING_PHASE
    return StageState.RUNNING if attempt.state is AttemptState.RUNNING and joined else StageState.STARTING


def note_on(attempt: Attempt, state: StageState) -> str:
    """What a stage with a live attempt waits for."""
    if attempt.held is not None:
        return f"Waiting: {attempt.held.reason}: {attempt.held.message}"
    if state is not StageState.STARTING or (attempt.progress is not None and attempt.progress.message):
        return ""
    return f"Starting: {attempt.missing or 'its ranks have not joined yet'}"


def follows(status: StageStatus) -> bool:
    """Whether the newest attempt is not settled yet."""
    return status.attempt > status.settled


def settled(status: StageStatus, **changes: object) -> StageStatus:
    """The status with its newest attempt settled."""
    return updated(status, settled=status.attempt, **changes)


def updated(status: StageStatus, **changes: object) -> StageStatus:
    """The status with these fields changed."""
    return status.model_copy(update=changes)


def seconds_until(due: datetime, *, now: datetime) -> float:
    """Seconds until ``due``, which is ahead."""
    return (due - now).total_seconds()
