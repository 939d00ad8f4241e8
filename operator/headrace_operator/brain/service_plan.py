"""Decisions about a server. Pure.

Attempts roll over: the old server stays up until the new one answers, even if the new one fails. A server that has
answered is done, and stays done while its replicas change.
"""

from dataclasses import dataclass

from headrace_api.faults import FaultClass, Outcome
from headrace_api.run import StageState, StageStatus
from headrace_operator.brain.budgets import with_fresh_budgets
from headrace_operator.brain.decision import Decision, StagePlan, note_on, settled, state_of, updated
from headrace_operator.brain.observed import LIVE, Attempt, AttemptState

_SERVED_SECONDS = 600.0
"""A server that has answered for this long gets its restart budget back, as training does by advancing."""
_ENDED_BY_ITSELF = Outcome(fault=FaultClass.PROCESS, reason="ServerEnded", message="the server exited")


@dataclass(frozen=True, kw_only=True)
class Service(Decision):
    """A stage that serves until the run is deleted."""

    def is_done(self, status: StageStatus) -> bool:
        """Never: a server must be kept alive."""
        return False

    def wait(self, before: StageStatus) -> StagePlan:
        """Keep serving while an earlier stage is being rerun."""
        has_begun = bool(before.attempt or self.attempts)
        return self.suspend(before) if self.run.spec.suspend and has_begun else StagePlan(status=before)

    def suspend(self, status: StageStatus) -> StagePlan:
        """Take the servers down, including a failed one: its Deployment would keep restarting it."""
        up = tuple(a for a in self.attempts if a.state in LIVE | {AttemptState.FAILED})
        if self.live():
            return self.stop(settled(status), up, then=", as suspend asks")
        fresh = settled(status, state=StageState.SUSPENDED, finished_at=None, retry_at=None, endpoint=None)
        return StagePlan(status=with_fresh_budgets(fresh), stop=up)

    def give_up(self, status: StageStatus) -> StagePlan:
        """Take down a server that cannot start, but never an older one that still serves."""
        failed = tuple(a for a in self.attempts if a.number == status.attempt and a.state is not AttemptState.SUCCEEDED)
        return StagePlan(status=status, stop=() if self._older(status) else failed)

    def in_the_way(self, current: Attempt | None) -> tuple[Attempt, ...]:
        """Nothing: a new server starts beside the old one."""
        return ()

    def replace(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Roll over to the next attempt."""
        return self.start_next(status)

    def keep(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Serving, or waiting to. Once the new server answers, older ones stop."""
        endpoint = current.progress.endpoint if current.progress is not None else None
        served = status.state is StageState.SUCCEEDED
        if endpoint is not None:
            finished = status.finished_at or self.observed.now
            status = updated(status, state=StageState.SUCCEEDED, endpoint=endpoint, finished_at=finished)
            return StagePlan(status=status, done=True, stop=self.live(besides=current))
        state = StageState.SUCCEEDED if served else state_of(current, before=status.state)
        return StagePlan(status=updated(status, state=state), done=served, note=note_on(current, state))

    def ended(self, status: StageStatus, current: Attempt) -> StagePlan:
        """Charge it: a server should never exit."""
        return self.charge(status, current.outcome or _ENDED_BY_ITSELF)

    def charge(self, status: StageStatus, outcome: Outcome) -> StagePlan:
        """Charge a failure; a server that had served for long enough gets its budget back first."""
        since = status.finished_at  # unset until it serves
        if since is not None and (self.observed.now - since).total_seconds() >= _SERVED_SECONDS:
            status = with_fresh_budgets(status)
        said = outcome if outcome.fault is not None else _ENDED_BY_ITSELF
        return super().charge(status, said)

    def endpoint_meanwhile(self, status: StageStatus) -> str | None:
        """The address of the older server: both share one Service."""
        return status.endpoint if self._older(status) else None

    def _older(self, status: StageStatus) -> tuple[Attempt, ...]:
        return tuple(a for a in self.live() if a.number < status.attempt or a.hash != self.hash)
