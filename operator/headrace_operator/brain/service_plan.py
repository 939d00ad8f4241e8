"""What should happen to a server. Pure.

Attempts roll over: the server before stays up until the next one answers, and whatever becomes of that one. A server
that has answered is done, and stays so while its replicas move.
"""

from dataclasses import dataclass

from headrace_api.faults import FaultClass, Outcome
from headrace_api.run import StageState, StageStatus
from headrace_operator.brain.budgets import with_fresh_budgets
from headrace_operator.brain.decision import Decision, StagePlan, note_on, settled, state_of, updated
from headrace_operator.brain.observed import LIVE, Attempt, AttemptState

_SERVED_SECONDS = 600.0
"""A server that has answered for so long gets its restarts back, as training does by advancing."""
_ENDED_BY_ITSELF = Outcome(fault=FaultClass.PROCESS, reason="ServerEnded", message="the server ended by itself")


@dataclass(frozen=True, kw_only=True)
class Service(Decision):
    """A stage that serves, until the run is deleted."""

    def is_done(self, status: StageStatus) -> bool:
        """Never for good: it has to be kept alive."""
        return False

    def wait(self, before: StageStatus) -> StagePlan:
        """A stage before this one is not done again yet: what serves, goes on serving."""
        has_begun = bool(before.attempt or self.attempts)
        return self.suspend(before) if self.run.spec.suspend and has_begun else StagePlan(status=before)

    def suspend(self, status: StageStatus) -> StagePlan:
        """Take the servers down. One that failed may be started again and again by its Deployment."""
        up = tuple(a for a in self.attempts if a.state in LIVE | {AttemptState.FAILED})
        if self.live():
            return self.stop(settled(status), up, then=", as suspend asks")
        fresh = settled(status, state=StageState.SUSPENDED, finished_at=None, retry_at=None, endpoint=None)
        return StagePlan(status=with_fresh_budgets(fresh), stop=up)

    def give_up(self, status: StageStatus) -> StagePlan:
        """Take down a server that cannot start, unless that would take an older one down with it."""
        failed = tuple(a for a in self.attempts if a.number == status.attempt and a.state is not AttemptState.SUCCEEDED)
        return StagePlan(status=status, stop=() if self._older(status) else failed)

    def in_the_way(self, current: Attempt | None) -> tuple[Attempt, ...]:
        """Nothing: a server may start beside the one that it replaces."""
        return ()

    def replace(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Roll over to the next attempt."""
        return self.start_next(status)

    def keep(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Serving, or what that waits for; once it answers, no older server is needed."""
        endpoint = current.progress.endpoint if current.progress is not None else None
        served = status.state is StageState.SUCCEEDED
        if endpoint is not None:
            finished = status.finished_at or self.observed.now
            status = updated(status, state=StageState.SUCCEEDED, endpoint=endpoint, finished_at=finished)
            return StagePlan(status=status, done=True, stop=self.live(besides=current))
        state = StageState.SUCCEEDED if served else state_of(current, before=status.state)
        return StagePlan(status=updated(status, state=state), done=served, note=note_on(current, state))

    def ended(self, status: StageStatus, current: Attempt) -> StagePlan:
        """A server does not end by itself."""
        return self.charge(status, current.outcome or _ENDED_BY_ITSELF)

    def charge(self, status: StageStatus, outcome: Outcome) -> StagePlan:
        """Charge a failure; a server that had answered for long has its budget back."""
        since = status.finished_at if status.state is StageState.SUCCEEDED else None
        if since is not None and (self.observed.now - since).total_seconds() >= _SERVED_SECONDS:
            status = with_fresh_budgets(status)
        said = outcome if outcome.fault is not None else _ENDED_BY_ITSELF
        return super().charge(status, said)

    def endpoint_meanwhile(self, status: StageStatus) -> str | None:
        """That of an older server, which answers at the same address."""
        return status.endpoint if self._older(status) else None

    def _older(self, status: StageStatus) -> tuple[Attempt, ...]:
        return tuple(a for a in self.live() if a.number < status.attempt or a.hash != self.hash)
