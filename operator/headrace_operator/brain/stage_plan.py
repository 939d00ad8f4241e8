"""The decision about one stage. Pure.

In: the stage, its last status, its attempts, and whether earlier stages are done. Out: the attempt that should exist,
those that should end, and the new status.
"""

from collections.abc import Mapping

from headrace_api.artifact import ArtifactRef, stage_hash
from headrace_api.run import Stage, StageState, StageStatus, TrainingRun
from headrace_api.stages import RunsAs
from headrace_operator.brain.budgets import with_fresh_budgets
from headrace_operator.brain.decision import Decision, StagePlan, updated
from headrace_operator.brain.observed import Observed
from headrace_operator.brain.service_plan import Service
from headrace_operator.brain.work_plan import Work


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
        run: the run that contains the stage.
        stage: the stage, as written.
        before: its status from the last plan.
        observed: what the body observes.
        ready: whether all earlier stages are done.
        finished: stage name -> artifact, for the stages that are done.
    """
    if not ready:
        waiting = _decision(run, stage, observed, inputs={}, digest=before.hash or "")
        return waiting.wait(_at_rest(before, waiting))
    inputs = {slot: finished[source] for slot, source in stage.config.inputs().items()}
    digest = stage_hash(stage.config, seed=run.spec.seed, inputs={slot: ref.digest for slot, ref in inputs.items()})
    decide = _decision(run, stage, observed, inputs=inputs, digest=digest)
    status = before if before.hash == digest else _begin_again(before, digest)
    if decide.is_done(status):
        return StagePlan(status=status, done=True, stop=decide.live())
    if run.spec.suspend:
        return decide.suspend(status)
    if status.state is StageState.FAILED and not decide.edited(status, digest=status.digest):
        return decide.give_up(status)
    if status.state is StageState.FAILED:
        status = with_fresh_budgets(status)
    return decide.advance(status)


def _decision(
    run: TrainingRun, stage: Stage, observed: Observed, *, inputs: Mapping[str, ArtifactRef], digest: str
) -> Decision:
    kind = Service if stage.config.RUNS_AS is RunsAs.SERVICE else Work
    attempts = observed.of_stage(stage.name)
    return kind(run=run, stage=stage, inputs=inputs, hash=digest, attempts=attempts, observed=observed)


def _at_rest(before: StageStatus, decide: Decision) -> StageStatus:
    """The status of a stage that has stopped, or is suspended no more: it waits for its turn like any other."""
    has_stopped = before.state is StageState.STOPPING and not decide.live()
    is_resumed = before.state is StageState.SUSPENDED and not decide.run.spec.suspend
    return updated(before, state=StageState.PENDING) if has_stopped or is_resumed else before


def _begin_again(before: StageStatus, digest: str) -> StageStatus:
    """Drop the result of an old spec or input. Restart counts go on, and so do attempt numbers, which name objects.

    A server keeps its address: the old one answers there until the new one does.
    """
    return StageStatus(
        name=before.name,
        attempt=before.attempt,
        settled=before.attempt,
        hash=digest,
        generation=before.generation,
        infra_restarts=before.infra_restarts,
        user_restarts=before.user_restarts,
        endpoint=before.endpoint,
    )
