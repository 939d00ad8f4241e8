"""What should happen to one stage now. Pure.

In: the stage, what its status said, its attempts, whether the stages before it are done. Out: the attempt that should
exist, the attempts that should end, and the stage's new status.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from headrace_api.artifact import ArtifactRef, stage_hash
from headrace_api.contract import ResolvedStage, join_uri
from headrace_api.faults import REMEDIES, Budget, FaultClass, Outcome
from headrace_api.run import RestartPolicy, Stage, StageState, StageStatus, TrainingRun
from headrace_api.stages import RunsAs
from headrace_operator.brain.observed import LIVE, Attempt, AttemptState, Observed

_LONGEST_WAIT_SECONDS = 60.0
_POLL_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What should be true of one stage."""

    status: StageStatus
    done: bool = False
    """Whether the next stage may begin."""
    start: ResolvedStage | None = None
    stop: tuple[int, ...] = ()
    requeue_after_seconds: float | None = None


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
    if status.state is StageState.SUCCEEDED and stage.config.RUNS_AS is not RunsAs.SERVICE:
        return StagePlan(status=status, done=True, stop=decide.numbers_live())
    if run.spec.suspend:
        return decide.suspend(status)
    if status.state is StageState.FAILED:
        # A server that failed may still be started again and again by its Deployment.
        return StagePlan(status=status, stop=decide.numbers_live(failed=stage.config.RUNS_AS is RunsAs.SERVICE))
    return decide.advance(status)


def _wait(before: StageStatus, attempts: tuple[Attempt, ...]) -> StagePlan:
    """A stage before this one is not done (any more): nothing of this one may run."""
    live = tuple(a.number for a in attempts if a.state in LIVE)
    if live and before.state in (StageState.RUNNING, StageState.STOPPING):
        before = before.model_copy(update={"state": StageState.STOPPING})
    return StagePlan(status=before, stop=live)


def _begin_again(before: StageStatus, digest: str) -> StageStatus:
    """The spec or an input changed: forget the old result, but go on counting attempts, which name objects."""
    return StageStatus(name=before.name, attempt=before.attempt, hash=digest)


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One stage whose turn it is, with everything a decision needs."""

    run: TrainingRun
    stage: Stage
    inputs: Mapping[str, ArtifactRef]
    hash: str
    attempts: tuple[Attempt, ...]
    observed: Observed

    def numbers_live(self, *, besides: int = 0, failed: bool = False) -> tuple[int, ...]:
        states = LIVE | {AttemptState.FAILED} if failed else LIVE
        return tuple(a.number for a in self.attempts if a.state in states and a.number != besides)

    def suspend(self, status: StageStatus) -> StagePlan:
        """Stop after a checkpoint; a failed stage gets its budgets back, so that resuming tries again."""
        done = self._succeeded(status)
        if done is not None:
            return done
        live = self.numbers_live()
        if live:
            return StagePlan(
                status=_with(status, state=StageState.STOPPING), stop=live, requeue_after_seconds=_POLL_SECONDS
            )
        fresh = _with(
            status, state=StageState.SUSPENDED, infra_restarts=0, user_restarts=0, finished_at=None, retry_at=None
        )
        return StagePlan(status=fresh)

    def advance(self, status: StageStatus) -> StagePlan:
        """Start, keep, restart or finish the stage."""
        current = self._current(status)
        strays = self.numbers_live(besides=status.attempt if current is not None else 0)
        if strays:
            return StagePlan(
                status=_with(status, state=StageState.STOPPING), stop=strays, requeue_after_seconds=_POLL_SECONDS
            )
        if current is None:
            return self._without_attempt(status)
        if current.state is AttemptState.STOPPING:
            return StagePlan(status=_with(status, state=StageState.STOPPING), requeue_after_seconds=_POLL_SECONDS)
        if current.state in LIVE:
            return self._keep(status, current)
        return self._succeeded(status) or self._failed(status, current)

    def _current(self, status: StageStatus) -> Attempt | None:
        """The newest attempt, if the status still follows it and it was started for this hash."""
        following = status.state in (StageState.RUNNING, StageState.STOPPING, StageState.SUCCEEDED)
        found = next((a for a in self.attempts if a.number == status.attempt), None)
        return found if following and found is not None and found.hash == self.hash else None

    def _without_attempt(self, status: StageStatus) -> StagePlan:
        wait = self._seconds_to_retry(status)
        if wait > 0:
            return StagePlan(status=status, requeue_after_seconds=wait)
        if status.state in (StageState.RUNNING, StageState.SUCCEEDED) and not self._seen(status.attempt):
            return self._start(status, number=status.attempt)  # its objects were removed: the same attempt goes on
        newest = max([status.attempt, *(a.number for a in self.attempts)])
        return self._start(status, number=newest + 1)

    def _seen(self, number: int) -> bool:
        return any(a.number == number for a in self.attempts)

    def _seconds_to_retry(self, status: StageStatus) -> float:
        return (status.retry_at - self.observed.now).total_seconds() if status.retry_at is not None else 0.0

    def _start(self, status: StageStatus, *, number: int) -> StagePlan:
        started = status.started_at or self.observed.now
        status = _with(
            status, state=StageState.RUNNING, attempt=number, started_at=started, retry_at=None, endpoint=None
        )
        return StagePlan(status=status, start=self._resolved(number))

    def _keep(self, status: StageStatus, current: Attempt) -> StagePlan:
        endpoint = current.progress.endpoint if current.progress is not None else None
        serving = self.stage.config.RUNS_AS is RunsAs.SERVICE and endpoint is not None
        if serving:
            finished = status.finished_at or self.observed.now
            status = _with(status, state=StageState.SUCCEEDED, endpoint=endpoint, finished_at=finished)
        else:
            status = _with(status, state=StageState.RUNNING, endpoint=None)
        return StagePlan(status=status, done=serving, start=self._resolved(current.number))

    def _succeeded(self, status: StageStatus) -> StagePlan | None:
        """The stage as finished, if its newest attempt says so and names the artifact."""
        current = self._current(status)
        if current is None or current.state is not AttemptState.SUCCEEDED or current.outcome is None:
            return None
        digest = current.outcome.artifact_digest
        if digest is None:
            return None
        ref = ArtifactRef(uri=self._folder(), digest=digest, kind=self.stage.config.GIVES)
        status = _with(
            status,
            state=StageState.SUCCEEDED,
            finished_at=self.observed.now,
            artifact=ref,
            metrics=current.outcome.metrics,
            reason=None,
            message=None,
        )
        return StagePlan(status=status, done=True)

    def _failed(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Charge the fault to its budget; try again within it, fail beyond it."""
        if current.state is AttemptState.SUCCEEDED:
            # Its last words were lost. The next attempt finds the artifact in storage, or makes it.
            return self._start(status, number=current.number + 1)
        outcome = current.outcome or Outcome(fault=FaultClass.POD, reason="Vanished", message="no pod is left to ask")
        status, within = charge(status, outcome, policy=self.run.spec.restart_policy)
        if not within:
            return StagePlan(status=_with(status, state=StageState.FAILED, finished_at=self.observed.now))
        wait = backoff_seconds(outcome, failures=status.infra_restarts + status.user_restarts)
        if wait == 0:
            return self._start(status, number=current.number + 1)
        retry_at = self.observed.now + timedelta(seconds=wait)
        return StagePlan(status=_with(status, state=StageState.PENDING, retry_at=retry_at), requeue_after_seconds=wait)

    def _folder(self) -> str:
        assert self.run.spec.storage.uri is not None, "a body fills in storage.uri before it plans"
        return join_uri(self.run.spec.storage.uri, self.stage.name)

    def _resolved(self, number: int) -> ResolvedStage:
        return ResolvedStage(
            run=self.run.metadata.name,
            namespace=self.run.metadata.namespace,
            run_uid=self.run.metadata.uid,
            stage=self.stage,
            attempt=number,
            seed=self.run.spec.seed,
            hash=self.hash,
            inputs=dict(self.inputs),
            storage=self.run.spec.storage,
            output_uri=self._folder(),
        )


def charge(status: StageStatus, outcome: Outcome, *, policy: RestartPolicy) -> tuple[StageStatus, bool]:
    """Charge a failure to its budget.

    Returns:
        The status with the failure counted and described, and whether the budget allows another attempt.
    """
    remedy = REMEDIES[outcome.fault or FaultClass.PROCESS]
    used = {
        Budget.INFRA: (status.infra_restarts, policy.max_infra_restarts),
        Budget.USER: (status.user_restarts, policy.max_user_restarts),
        Budget.NONE: (0, 1),
    }[remedy.budget]
    within = remedy.retry and used[0] < used[1]
    counted = {
        Budget.INFRA: {"infra_restarts": status.infra_restarts + within},
        Budget.USER: {"user_restarts": status.user_restarts + within},
        Budget.NONE: {},
    }[remedy.budget]
    return _with(status, reason=outcome.reason, message=outcome.message, **counted), within


def backoff_seconds(outcome: Outcome, *, failures: int) -> float:
    """How long to wait before the next attempt: not at all after a stop or a first failure, then twice as long each time."""
    if outcome.fault is FaultClass.STOPPED or failures <= 1:
        return 0.0
    return min(2.0 ** (failures - 1), _LONGEST_WAIT_SECONDS)


def _with(status: StageStatus, **changes: object) -> StageStatus:
    return status.model_copy(update=changes)
