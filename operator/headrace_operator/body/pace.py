"""Rate limit for status writes that carry only progress: per run, and over all runs together.

With few runs the columns are at most ten seconds old; with thousands they get older, to spare the API server. Metrics
are always as fresh as the reports. Pure: the caller passes the time.
"""

PROGRESS_SECONDS = 10.0
"""The shortest interval between a run's progress writes."""
PROGRESS_WRITES_PER_SECOND = 25.0


class Pace:
    """Gives each run with unwritten progress a turn.

    Args:
        now: stands in for the time of the last write of every run that an earlier leader wrote.
    """

    def __init__(self, *, now: float) -> None:
        self._began = self._next_turn = now
        self._written: dict[str, float] = {}
        self._turns: dict[str, float] = {}

    def seconds_to_turn(self, run_uid: str, *, now: float) -> float:
        """How long a run's progress still has to wait. Assigns a turn on the first call after a write."""
        turn = self._turns.get(run_uid)
        if turn is None:
            self._next_turn = max(self._next_turn + 1 / PROGRESS_WRITES_PER_SECOND, now)
            turn = max(self._next_turn, self._written.get(run_uid, self._began) + PROGRESS_SECONDS)
            self._turns[run_uid] = turn
        return max(0.0, turn - now)

    def has_turn(self, run_uid: str) -> bool:
        """Whether the run is already waiting for its turn."""
        return run_uid in self._turns

    def written(self, run_uid: str, *, now: float) -> None:
        """Note that a run's status was written."""
        self._written[run_uid] = now
        self.nothing_to_write(run_uid)

    def nothing_to_write(self, run_uid: str) -> None:
        """Note that a run's status is up to date."""
        self._turns.pop(run_uid, None)

    def forget(self, run_uid: str) -> None:
        """Forget a deleted run."""
        self._written.pop(run_uid, None)
        self.nothing_to_write(run_uid)
