"""What should happen to a stage that ends by itself: a gang, or tasks. Pure.

One attempt at a time: the next one starts when the machines of all others are free.
"""

from dataclasses import dataclass
from datetime import timedelta

from headrace_api.artifact import ArtifactRef
from headrace_api.faults import FaultClass, Outcome
from headrace_api.run import StageState, StageStatus
from headrace_operator.brain.budgets import with_fresh_budgets
from headrace_operator.brain.decision import (
    Decision,
    StagePlan,
    follows,
    note_on,
    seconds_until,
    settled,
    state_of,
    updated,
)
from headrace_operator.brain.observed import Attempt, AttemptState

_OUTCOME_SECONDS = 30.0
"""A Job is seen to be complete before or after its pods are; the API server sends them apart."""
_OUTCOME_LOST = Outcome(
    fault=FaultClass.POD,
    reason="OutcomeLost",
    message="the attempt succeeded, and what it left was not said; the next one looks for that in storage",
)

_UNDER_WAY = frozenset({StageState.WAITING, StageState.STARTING, StageState.RUNNING, StageState.STOPPING})


@dataclass(frozen=True, kw_only=True)
class Work(Decision):
    """A stage that leaves an artifact."""

    def advance(self, status: StageStatus) -> StagePlan:
        """Start, keep, restart or finish the stage."""
        return self._succeeded(status) or super().advance(status)

    def is_done(self, status: StageStatus) -> bool:
        """Whether it has left its artifact."""
        return status.state is StageState.SUCCEEDED

    def wait(self, before: StageStatus) -> StagePlan:
        """End what runs: what it reads is being made again."""
        live = self.live()
        if live and before.state in _UNDER_WAY:
            before = settled(before, state=StageState.STOPPING)
        return StagePlan(status=before, stop=live)

    def suspend(self, status: StageStatus) -> StagePlan:
        """Stop after a checkpoint; what finishes meanwhile has finished."""
        done = self._succeeded(status)
        if done is not None:
            return done
        if live := self.live():
            return self.stop(settled(status), live, then=", as suspend asks")
        return StagePlan(
            status=with_fresh_budgets(settled(status, state=StageState.SUSPENDED, finished_at=None, retry_at=None))
        )

    def give_up(self, status: StageStatus) -> StagePlan:
        """Free the machines of a stage that has failed."""
        return StagePlan(status=status, stop=self.live())

    def in_the_way(self, current: Attempt | None) -> tuple[Attempt, ...]:
        """Everything that holds machines."""
        return self.live(besides=current)

    def replace(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Have the attempt save and end; the next one goes on from there."""
        return self.make_way(status, (current,))

    def keep(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Running, or what that waits for."""
        state = state_of(current, before=status.state)
        return StagePlan(status=updated(status, state=state), note=note_on(current, state))

    def ended(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Charge a failure. The outcome of a success may still come; without it the next attempt asks storage."""
        if current.state is AttemptState.FAILED:
            no_words = Outcome(fault=FaultClass.POD, reason="Vanished", message="no pod is left to ask")
            return self.charge(status, current.outcome or no_words)
        now, longest = self.observed.now, self.observed.now + timedelta(seconds=_OUTCOME_SECONDS)
        due = min(status.outcome_due_at or longest, longest)
        if due <= now:
            return self.charge(status, _OUTCOME_LOST)
        note = "Waiting: the attempt succeeded and has not said yet what it left"
        status = updated(status, outcome_due_at=due)
        return StagePlan(status=status, requeue_after_seconds=seconds_until(due, now=now), note=note)

    def _succeeded(self, status: StageStatus) -> StagePlan | None:
        """The stage as finished, if its newest attempt says so and names the artifact."""
        asked = follows(status) or status.state is StageState.STOPPING  # it may finish while it is being stopped
        newest = self.newest(status) if asked else None
        if newest is None or newest.state is not AttemptState.SUCCEEDED or newest.outcome is None:
            return None
        if newest.outcome.artifact_digest is None:
            return None
        ref = ArtifactRef(uri=self.folder(), digest=newest.outcome.artifact_digest, kind=self.stage.config.GIVES)
        status = settled(
            with_fresh_budgets(status),
            state=StageState.SUCCEEDED,
            finished_at=self.observed.now,
            retry_at=None,
            outcome_due_at=None,
            artifact=ref,
            metrics=newest.outcome.metrics,
            reason=None,
            message=None,
        )
        return StagePlan(status=status, done=True, stop=self.live())
