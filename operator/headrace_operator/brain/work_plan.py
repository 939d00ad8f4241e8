"""Decisions about a stage that runs to completion, as a gang or as independent tasks. Pure.

One attempt at a time: the next starts once all others have released their machines.
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
"""How long a successful attempt's outcome may lag: a Job can be seen complete before its pods are."""
_OUTCOME_LOST = Outcome(
    fault=FaultClass.POD,
    reason="OutcomeLost",
    message="the attempt succeeded but its outcome was lost; the next attempt looks for the artifact in storage",
)

_UNDER_WAY = frozenset({StageState.WAITING, StageState.STARTING, StageState.RUNNING, StageState.STOPPING})


@dataclass(frozen=True, kw_only=True)
class Work(Decision):
    """A stage that produces an artifact."""

    def advance(self, status: StageStatus) -> StagePlan:
        """Start, keep, restart or finish the stage."""
        return self._succeeded(status) or super().advance(status)

    def is_done(self, status: StageStatus) -> bool:
        """Whether it has produced its artifact."""
        return status.state is StageState.SUCCEEDED

    def wait(self, before: StageStatus) -> StagePlan:
        """Stop what runs: its input is being rebuilt."""
        live = self.live()
        if live and before.state in _UNDER_WAY:
            before = settled(before, state=StageState.STOPPING)
        return StagePlan(status=before, stop=live)

    def suspend(self, status: StageStatus) -> StagePlan:
        """Stop after a checkpoint. An attempt that finishes meanwhile counts."""
        done = self._succeeded(status)
        if done is not None:
            return done
        if live := self.live():
            return self.stop(settled(status), live, then=", as suspend asks")
        return StagePlan(
            status=with_fresh_budgets(settled(status, state=StageState.SUSPENDED, finished_at=None, retry_at=None))
        )

    def give_up(self, status: StageStatus) -> StagePlan:
        """Release the machines of a failed stage."""
        return StagePlan(status=status, stop=self.live())

    def in_the_way(self, current: Attempt | None) -> tuple[Attempt, ...]:
        """Every other attempt that holds machines."""
        return self.live(besides=current)

    def replace(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Have the attempt save and exit; the next one resumes."""
        return self.make_way(status, (current,))

    def keep(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Running, or waiting to."""
        state = state_of(current, before=status.state)
        return StagePlan(status=updated(status, state=state), note=note_on(current, state))

    def ended(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Charge a failure. Give a success time to report its outcome; without one, the next attempt checks storage."""
        if current.state is AttemptState.FAILED:
            no_words = Outcome(fault=FaultClass.POD, reason="Vanished", message="all of the attempt's pods are gone")
            return self.charge(status, current.outcome or no_words)
        now, longest = self.observed.now, self.observed.now + timedelta(seconds=_OUTCOME_SECONDS)
        due = min(status.outcome_due_at or longest, longest)
        if due <= now:
            return self.charge(status, _OUTCOME_LOST)
        note = "Waiting: the attempt succeeded; its outcome is still to come"
        status = updated(status, outcome_due_at=due)
        return StagePlan(status=status, requeue_after_seconds=seconds_until(due, now=now), note=note)

    def _succeeded(self, status: StageStatus) -> StagePlan | None:
        """The finished stage, if its newest attempt succeeded and names the artifact."""
        asked = follows(status) or status.state is StageState.STOPPING  # it may finish while being stopped
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
