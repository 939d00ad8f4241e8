"""What should happen to one stage now. Pure.

In: the stage, what its status said, its attempts, whether the stages before it are done. Out: the attempt that should
exist, the attempts that should end, and the stage's new status.

The status follows its newest attempt until that is *settled*: charged to a budget, or stopped on request. Whatever is
seen of a settled attempt later, a replay or a ghost, costs nothing more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from headrace_api.artifact import ArtifactRef, stage_hash
from headrace_api.contract import STARTING_PHASE, ResolvedStage, join_uri
from headrace_api.faults import BUDGETS, Budget, FaultClass, Outcome
from headrace_api.run import RestartPolicy, Stage, StageState, StageStatus, TrainingRun
from headrace_api.stages import RunsAs
from headrace_operator.brain.observed import LIVE, Attempt, AttemptState, Observed

_LONGEST_BACKOFF_SECONDS = 60.0
_POLL_SECONDS = 5.0
_CAPACITY_SECONDS = (15.0, 300.0)
"""How often a start that was refused for want of room is tried again: after a tenth of the time that it has waited."""
_OUTCOME_SECONDS = 30.0
"""A Job is seen to be complete before or after its pods are; the API server sends them apart."""
_SERVED_SECONDS = 600.0
"""A server that has answered for so long gets its restarts back, as training does by advancing."""
_START_SECONDS = 600.0
"""How long a node may try to start a container, as one whose image it cannot pull, while the gang's other nodes idle."""

_ENDED_BY_ITSELF = Outcome(fault=FaultClass.PROCESS, reason="ServerEnded", message="the server ended by itself")
_OUTCOME_LOST = Outcome(
    fault=FaultClass.POD,
    reason="OutcomeLost",
    message="the attempt succeeded, and what it left was not said; the next one looks for that in storage",
)
_VANISHED = Outcome(fault=FaultClass.POD, reason="Vanished", message="the attempt is gone, and no pod is left to ask")


_UNDER_WAY = frozenset({StageState.WAITING, StageState.STARTING, StageState.RUNNING, StageState.STOPPING})


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


def plan_stage(
    run: TrainingRun,
    stage: Stage,
    before: StageStatus,
    observed: Observed,
    *,
    ready: bool,
    finished: Mapping[str, ArtifactRef],
) -> StagePlan:
    """Decide about one stage.

    Args:
        run: the run that the stage is in.
        stage: the stage as written.
        before: the stage's status as the last plan left it.
        observed: what the body sees.
        ready: whether every stage before this one is done.
        finished: stage name -> artifact, of the stages that are done.
    """
    attempts = observed.of_stage(stage.name)
    if not ready:
        return _wait(before, attempts)
    inputs = {slot: finished[source] for slot, source in stage.config.inputs().items()}
    digest = stage_hash(stage.config, seed=run.spec.seed, inputs={slot: ref.digest for slot, ref in inputs.items()})
    status = before if before.hash == digest else _begin_again(before, digest)
    decide = _Stage(run=run, stage=stage, inputs=inputs, hash=digest, attempts=attempts, observed=observed)
    if status.state is StageState.SUCCEEDED and not decide.serves:
        return StagePlan(status=status, done=True, stop=decide.live())
    if run.spec.suspend:
        return decide.suspend(status)
    if status.state is StageState.FAILED and decide.edited(status, digest=status.digest):
        status = _with_fresh_budgets(_with(status, state=StageState.PENDING))
    if status.state is StageState.FAILED:
        # A server that failed may still be started again and again by its Deployment.
        return StagePlan(status=status, stop=decide.live(failed=decide.serves))
    return decide.advance(status)


def _wait(before: StageStatus, attempts: tuple[Attempt, ...]) -> StagePlan:
    """A stage before this one is not done (any more): nothing of this one may run."""
    live = tuple(a for a in attempts if a.state in LIVE)
    if live and before.state in _UNDER_WAY:
        before = _settled(before, state=StageState.STOPPING)
    return StagePlan(status=before, stop=live)


def _begin_again(before: StageStatus, digest: str) -> StageStatus:
    """The spec or an input changed: forget the old result, but go on counting attempts, which name objects, and restarts."""
    return StageStatus(
        name=before.name,
        attempt=before.attempt,
        settled=before.attempt,
        hash=digest,
        generation=before.generation,
        infra_restarts=before.infra_restarts,
        user_restarts=before.user_restarts,
    )


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One stage whose turn it is, with everything a decision needs."""

    run: TrainingRun
    stage: Stage
    inputs: Mapping[str, ArtifactRef]
    hash: str
    attempts: tuple[Attempt, ...]
    observed: Observed

    @property
    def serves(self) -> bool:
        """Whether it is a server, which does not end by itself."""
        return self.stage.config.RUNS_AS is RunsAs.SERVICE

    def live(self, *, besides: Attempt | None = None, failed: bool = False) -> tuple[Attempt, ...]:
        """The attempts that hold machines."""
        states = LIVE | {AttemptState.FAILED} if failed else LIVE
        return tuple(a for a in self.attempts if a.state in states and a != besides)

    def edited(self, status: StageStatus, *, digest: str | None) -> bool:
        """Whether the user wants another attempt than one that was resolved to ``digest``.

        The spec's generation decides that there was an edit at all: another version of the planner may resolve the same
        spec to another digest, and leaves what runs alone.
        """
        generation = self.run.metadata.generation
        same = generation is not None and status.generation == generation
        return not same and bool(digest) and digest != self._resolved(max(1, status.attempt)).digest

    def suspend(self, status: StageStatus) -> StagePlan:
        """Stop after a checkpoint; a failed stage gets its budgets back, so that resuming tries again."""
        done = self._succeeded(status)
        if done is not None:
            return done
        live = self.live()
        if live:
            return self._stop(_settled(status), live, then=", as suspend asks")
        fresh = _settled(status, state=StageState.SUSPENDED, finished_at=None, retry_at=None, endpoint=None)
        return StagePlan(status=_with_fresh_budgets(fresh))

    def advance(self, status: StageStatus) -> StagePlan:
        """Start, keep, restart or finish the stage."""
        done = self._succeeded(status)
        if done is not None:
            return done
        current = self._newest(status) if _follows(status) else None
        if current is not None and current.uid:
            status = _with(status, workload=current.uid)
        elif current is None and _follows(status) and status.workload is not None:
            return self._charge(status, _VANISHED)
        strays = self.live(besides=current)
        if strays:
            return self._make_way(status, strays)
        refusal = self.observed.refusal(self.stage.name, status.attempt) if _follows(status) else None
        if refusal is not None and refusal.fault is not FaultClass.CAPACITY:
            return self._charge(status, refusal)
        if current is None:
            return self._without_attempt(status, refusal)
        if current.state is AttemptState.STOPPING:
            return self._stop(status, ())
        if current.state in LIVE:
            if self.edited(status, digest=current.digest):
                return self._make_way(_settled(status), (current,))
            return self._keep(_with(status, generation=self.run.metadata.generation), current, refusal)
        if current.state is AttemptState.SUCCEEDED:
            return self._charge(status, _ENDED_BY_ITSELF) if self.serves else self._await_outcome(status)
        return self._charge(status, current.outcome or _VANISHED)

    def _newest(self, status: StageStatus) -> Attempt | None:
        """The newest attempt, if it was started for this hash, and is the one that was seen before."""
        same = (a for a in self.attempts if a.number == status.attempt and a.hash == self.hash)
        return next((a for a in same if status.workload in (None, a.uid) or not a.uid), None)

    def _stop(self, status: StageStatus, attempts: tuple[Attempt, ...], *, then: str = "") -> StagePlan:
        """Wait for attempts to end, having asked them to if that has not happened by itself."""
        numbers = " and ".join(str(n) for n in sorted({a.number for a in attempts}))
        return StagePlan(
            status=_with(status, state=StageState.STOPPING),
            stop=attempts,
            requeue_after_seconds=_POLL_SECONDS,
            note=f"Stopping: attempt {numbers} saves and ends{then}" if attempts else "",
        )

    def _make_way(self, status: StageStatus, attempts: tuple[Attempt, ...]) -> StagePlan:
        """End attempts that are not wanted any more, at no cost. A running attempt is never changed: the next one is."""
        edited = status.generation != self.run.metadata.generation
        return self._stop(status, attempts, then="; the next one applies the edited spec" if edited else "")

    def _without_attempt(self, status: StageStatus, refusal: Outcome | None) -> StagePlan:
        now = self.observed.now
        if status.retry_at is not None and status.retry_at > now:
            # A time beyond the longest wait was written by another clock.
            due = min(status.retry_at, now + timedelta(seconds=_LONGEST_BACKOFF_SECONDS))
            note = f"Restarting: {status.reason}: {status.message}"
            return StagePlan(status=_with(status, retry_at=due), requeue_after_seconds=_seconds(now, due), note=note)
        if _follows(status) and all(a.number != status.attempt for a in self.attempts):
            return self._start(status, number=status.attempt, refusal=refusal)  # it was never seen: it is made now
        newest = max([status.attempt, *(a.number for a in self.attempts)])
        return self._start(status, number=newest + 1)

    def _start(self, status: StageStatus, *, number: int, refusal: Outcome | None = None) -> StagePlan:
        started, resolved = status.started_at or self.observed.now, self._resolved(number)
        status = _with(
            status,
            state=StageState.STARTING,
            attempt=number,
            generation=self.run.metadata.generation,
            digest=resolved.digest,
            workload=None,
            started_at=started,
            finished_at=None,
            retry_at=None,
            outcome_due_at=None,
            endpoint=None,
        )
        return self._with_refusal(StagePlan(status=status, start=resolved), refusal)

    def _with_refusal(self, plan: StagePlan, refusal: Outcome | None) -> StagePlan:
        if refusal is None:
            return plan
        started, (shortest, longest) = plan.status.started_at or self.observed.now, _CAPACITY_SECONDS
        again = min(max((self.observed.now - started).total_seconds() / 10, shortest), longest)
        return replace(
            plan,
            status=_with(plan.status, state=StageState.WAITING),
            requeue_after_seconds=again,
            note=f"Waiting: {refusal.reason}: {refusal.message}",
        )

    def _keep(self, status: StageStatus, current: Attempt, refusal: Outcome | None) -> StagePlan:
        """Follow an attempt that lives."""
        held, left = current.held, None
        if held is not None and held.since is not None:
            due = held.since + timedelta(seconds=_START_SECONDS)
            left = _seconds(self.observed.now, due)
            if due <= self.observed.now:
                return self._charge(status, Outcome(fault=FaultClass.POD, reason=held.reason, message=held.message))
        if _step_of(current) >= status.failed_step + self.run.spec.restart_policy.reset_after_steps:
            status = _with_fresh_budgets(status)
        endpoint = current.progress.endpoint if current.progress is not None else None
        serving = self.serves and endpoint is not None
        if serving:
            finished = status.finished_at or self.observed.now
            status = _with(status, state=StageState.SUCCEEDED, endpoint=endpoint, finished_at=finished)
        else:
            status = _with(status, state=_state_of(current, before=status.state), endpoint=None)
        plan = StagePlan(
            status=status,
            done=serving,
            start=self._resolved(current.number),
            requeue_after_seconds=left,
            note=_note(current, status.state),
        )
        return self._with_refusal(plan, refusal)

    def _succeeded(self, status: StageStatus) -> StagePlan | None:
        """The stage as finished, if its newest attempt says so and names the artifact."""
        asked = _follows(status) or status.state is StageState.STOPPING  # it may finish while it is being stopped
        newest = self._newest(status) if asked else None
        if newest is None or newest.state is not AttemptState.SUCCEEDED or newest.outcome is None:
            return None
        if newest.outcome.artifact_digest is None:
            return None
        ref = ArtifactRef(uri=self._folder(), digest=newest.outcome.artifact_digest, kind=self.stage.config.GIVES)
        status = _with(
            status,
            state=StageState.SUCCEEDED,
            settled=status.attempt,
            infra_spent=0,
            user_spent=0,
            finished_at=self.observed.now,
            retry_at=None,
            outcome_due_at=None,
            artifact=ref,
            metrics=newest.outcome.metrics,
            reason=None,
            message=None,
        )
        return StagePlan(status=status, done=True, stop=self.live())

    def _await_outcome(self, status: StageStatus) -> StagePlan:
        """Its pods' last words may still come; without them the next attempt asks storage, and is charged."""
        now, longest = self.observed.now, self.observed.now + timedelta(seconds=_OUTCOME_SECONDS)
        due = min(status.outcome_due_at or longest, longest)
        if due <= now:
            return self._charge(status, _OUTCOME_LOST)
        status = _with(status, outcome_due_at=due)
        note = "Waiting: the attempt succeeded and has not said yet what it left"
        return StagePlan(status=status, requeue_after_seconds=_seconds(now, due), note=note)

    def _charge(self, status: StageStatus, outcome: Outcome) -> StagePlan:
        """Charge a failure to its budget; try again within it, fail beyond it. What still holds machines ends first."""
        policy, step = self.run.spec.restart_policy, max(outcome.step or 0, _step_of(self._newest(status)))
        if step >= status.failed_step + policy.reset_after_steps or self._served_for_long(status):
            status = _with_fresh_budgets(status)
        status = _settled(status, failed_step=max(status.failed_step, step))
        status, within = charge(status, outcome, policy=policy)
        stop = self.live()
        if not within:
            return StagePlan(
                status=_with(status, state=StageState.FAILED, finished_at=self.observed.now, retry_at=None), stop=stop
            )
        wait = backoff_seconds(failures=status.infra_spent + status.user_spent)
        if wait == 0 and not stop:
            return self._without_attempt(status, None)
        retry_at = self.observed.now + timedelta(seconds=wait)
        return StagePlan(
            status=_with(status, state=StageState.PENDING, retry_at=retry_at),
            stop=stop,
            requeue_after_seconds=max(wait, _POLL_SECONDS if stop else 0.0),
            note=f"Restarting: {status.reason}: {status.message}",
        )

    def _served_for_long(self, status: StageStatus) -> bool:
        """Whether a server had answered for so long that its failure is a new one."""
        if status.state is not StageState.SUCCEEDED or status.finished_at is None:
            return False
        return (self.observed.now - status.finished_at).total_seconds() >= _SERVED_SECONDS

    def _folder(self) -> str:
        assert self.run.spec.storage.uri is not None, "a body fills in storage.uri before it plans"
        return join_uri(self.run.spec.storage.uri, self.stage.name)

    def _resolved(self, number: int) -> ResolvedStage:
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
            output_uri=self._folder(),
            on_stall=self.run.spec.restart_policy.on_stall,
        )


def charge(status: StageStatus, outcome: Outcome, *, policy: RestartPolicy) -> tuple[StageStatus, bool]:
    """Charge a failure to its budget.

    Returns:
        The status with the failure counted and described, and whether the budget allows another attempt.
    """
    if BUDGETS.get(outcome.fault or FaultClass.PROCESS, Budget.INFRA) is Budget.USER:
        within = status.user_spent < policy.max_user_restarts
        counted = {"user_spent": status.user_spent + within, "user_restarts": status.user_restarts + within}
    else:
        within = status.infra_spent < policy.max_infra_restarts
        counted = {"infra_spent": status.infra_spent + within, "infra_restarts": status.infra_restarts + within}
    said = {"reason": outcome.reason, "message": outcome.message}
    return _with(status, **said, outcome_due_at=None, endpoint=None, **counted), within


def backoff_seconds(*, failures: int) -> float:
    """How long to wait before the next attempt: not at all after a first failure, then twice as long each time."""
    return min(2.0 ** min(failures - 1, 20), _LONGEST_BACKOFF_SECONDS) if failures > 1 else 0.0


def _state_of(attempt: Attempt, *, before: StageState) -> StageState:
    """Where a stage is whose attempt lives. One that was seen to run goes on running: reports are lost with a leader."""
    if attempt.held is not None:
        return StageState.WAITING
    phase = attempt.progress.phase if attempt.progress is not None else STARTING_PHASE
    joined = before is StageState.RUNNING or phase != STARTING_PHASE
    return StageState.RUNNING if attempt.state is AttemptState.RUNNING and joined else StageState.STARTING


def _note(attempt: Attempt, state: StageState) -> str:
    if state is StageState.WAITING and attempt.held is not None:
        return f"Waiting: {attempt.held.reason}: {attempt.held.message}"
    if state is not StageState.STARTING or (attempt.progress is not None and attempt.progress.message):
        return ""
    return f"Starting: {attempt.missing or 'its ranks have not joined yet'}"


def _with_fresh_budgets(status: StageStatus) -> StageStatus:
    return _with(status, infra_spent=0, user_spent=0)


def _step_of(attempt: Attempt | None) -> int:
    """The step that an attempt has reported; 0 where something else is counted."""
    progress = attempt.progress if attempt is not None else None
    return progress.done if progress is not None and progress.unit == "steps" else 0


def _follows(status: StageStatus) -> bool:
    return status.attempt > status.settled


def _settled(status: StageStatus, **changes: object) -> StageStatus:
    return _with(status, settled=status.attempt, **changes)


def _with(status: StageStatus, **changes: object) -> StageStatus:
    return status.model_copy(update=changes)


def _seconds(now: datetime, due: datetime) -> float:
    return max(0.0, (due - now).total_seconds())
