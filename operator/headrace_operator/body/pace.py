"""When progress is written to statuses: at most every so often for a run, and at most so often for all runs together.

Few runs have columns that are ten seconds old; thousands have older ones, and the API server is left in peace. Metrics
are as new as the reports either way. Pure but for nothing: the caller brings the time.
"""

PROGRESS_SECONDS = 10.0
"""How often a status is written for nothing but progress."""
PROGRESS_WRITES_PER_SECOND = 50.0


class Pace:
    """A turn for each run that has progress to write.

    Args:
        now: when nothing was written yet: stands for the last write of what another leader has written, for pods report
            anew before it is due again.
    """

    def __init__(self, *, now: float) -> None:
        self._began = self._next_turn = now
        self._written: dict[str, float] = {}
        self._turns: dict[str, float] = {}

    def seconds_to_turn(self, run_uid: str, *, now: float) -> float:
        """How long a run's progress is still to wait; the first time since its last write, it is given a turn."""
        turn = self._turns.get(run_uid)
        if turn is None:
            self._next_turn = max(self._next_turn + 1 / PROGRESS_WRITES_PER_SECOND, now)
            turn = max(self._next_turn, self._written.get(run_uid, self._began) + PROGRESS_SECONDS)
            self._turns[run_uid] = turn
        return max(0.0, turn - now)

    def has_turn(self, run_uid: str) -> bool:
        """Whether a run waits for its turn already."""
        return run_uid in self._turns

    def written(self, run_uid: str, *, now: float) -> None:
        """A run's status was written."""
        self._written[run_uid] = now
        self.nothing_to_write(run_uid)

    def nothing_to_write(self, run_uid: str) -> None:
        """A run's status is what it should be."""
        self._turns.pop(run_uid, None)

    def forget(self, run_uid: str) -> None:
        """A run is gone."""
        self._written.pop(run_uid, None)
        self.nothing_to_write(run_uid)
