"""Decides from the ranks' reports which rank is late, and which did not answer a stop request. Pure.

In: every rank's latest beat, and a clock. Out: ``Late`` ranks, with the limit that each one exceeded: by default
five times the 99th percentile of the rank's own step times, at least a minute; ten minutes while those are unknown.
"""

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

RUNNING = "Running"
LAUNCHER = -1
"""The launcher's number among the watched ranks."""
_SAVING = frozenset({"Saving", "Stopping"})
"""Phases in which a rank is already acting on a stop request."""
_BEFORE_WORK = frozenset({"Starting", "Loading"})
"""Phases with nothing to save yet."""

_FACTOR = 5.0
_SHORTEST_SECONDS = 60.0
_UNKNOWN_SECONDS = 120.0
"""Multiplied by ``_FACTOR``: the limit for a phase whose times are not known yet."""
_KNOWN = 3
"""How many times make a phase known."""
_KEPT = 200
ANSWER_SECONDS = 10.0
"""How long a rank with short steps may take to answer a stop request."""
_LONGEST_TICK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A rank's slot as last read."""

    beats: int
    reports: int
    phase: str = "Starting"
    done: int = 0
    unit: str = "steps"


@dataclass(frozen=True, kw_only=True)
class Late:
    """A rank that has been silent for too long."""

    rank: int
    phase: str
    done: int
    unit: str
    seconds: float
    """How long it has been silent."""
    bound: float
    """The limit."""


@dataclass(kw_only=True)
class _Watched:
    """One rank since it was first seen."""

    beat: Beat
    moved_at: float
    """When its beat last changed."""
    reported_at: float
    times: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=_KEPT)))
    """Seconds per unit, by phase. The first of each phase is excluded: it compiles, connects and fills caches."""
    seen: set[str] = field(default_factory=set)


class Watch:
    """Watches the ranks of one pod.

    Time in which the agent itself did not run is not counted: nobody is late because the whole machine was paused.

    Args:
        on_stall: ``restartPolicy.onStall`` in seconds.
    """

    def __init__(self, *, on_stall: float | None = None) -> None:
        self._on_stall = on_stall
        self._ranks: dict[int, _Watched] = {}
        self._now = 0.0
        self._clock: float | None = None

    def tick(self, clock: float) -> None:
        """Advance the clock.

        Args:
            clock: seconds from any origin.
        """
        if self._clock is not None:
            self._now += min(clock - self._clock, _LONGEST_TICK_SECONDS)
        self._clock = clock

    def see(self, rank: int, beat: Beat) -> None:
        """Record what a rank's slot says."""
        watched = self._ranks.get(rank)
        if watched is None:
            self._ranks[rank] = _Watched(beat=beat, moved_at=self._now, reported_at=self._now)
            return
        if beat.beats != watched.beat.beats:
            watched.moved_at = self._now
        if beat.reports != watched.beat.reports:
            phase, reports = watched.beat.phase, beat.reports - watched.beat.reports
            if phase in watched.seen:
                each = (self._now - watched.reported_at) / reports
                watched.times[phase] += [each] * min(reports, _KNOWN)
            watched.seen.add(phase)
            watched.reported_at = self._now
        watched.beat = beat

    def forget(self, rank: int) -> None:
        """Drop a rank that has ended."""
        self._ranks.pop(rank, None)

    def excuse(self, rank: int) -> None:
        """Restart the timer of a rank that is silent but working."""
        self._ranks[rank].moved_at = self._now

    def late(self) -> list[Late]:
        """The late ranks, longest first."""
        found = [(rank, w, self.bound(rank)) for rank, w in self._ranks.items()]
        late = [_late(rank, w, self._now, bound) for rank, w, bound in found if self._now - w.moved_at > bound]
        return sorted(late, key=lambda entry: -entry.seconds)

    def all(self) -> list[Late]:
        """Every rank, late or not, in order."""
        return [_late(rank, w, self._now, self.bound(rank)) for rank, w in sorted(self._ranks.items())]

    def bound(self, rank: int) -> float:
        """How long a rank may be silent in its current phase, in seconds."""
        watched = self._ranks[rank]
        phase, times = watched.beat.phase, watched.times[watched.beat.phase]
        if len(times) < _KNOWN:
            return _FACTOR * (self._on_stall or _UNKNOWN_SECONDS)
        if phase == RUNNING and self._on_stall is not None:
            return self._on_stall
        return max(self._on_stall or _SHORTEST_SECONDS, _FACTOR * percentile_99(times))

    def has_nothing_to_save(self) -> bool:
        """Whether no rank has started its work."""
        return all(w.beat.phase in _BEFORE_WORK for rank, w in self._ranks.items() if rank != LAUNCHER)

    def unanswered(self, *, seconds_since_stop: float) -> list[int]:
        """Ranks that were asked to stop but neither stop nor move.

        A rank that is saving, or whose phase has no known times, gets the whole grace period, which is enforced
        elsewhere. Any other must move within ten seconds, or twice its 99th percentile step time if that is longer.
        """
        ranks = [rank for rank in self._ranks if rank != LAUNCHER]
        return [r for r in ranks if self._does_not_answer(self._ranks[r], seconds_since_stop=seconds_since_stop)]

    def _does_not_answer(self, watched: _Watched, *, seconds_since_stop: float) -> bool:
        phase, times = watched.beat.phase, watched.times[watched.beat.phase]
        known = len(times) >= _KNOWN
        if phase in _SAVING or not (known or phase == RUNNING or phase in _BEFORE_WORK):
            return False
        allowed = max(ANSWER_SECONDS, 2 * percentile_99(times)) if known else ANSWER_SECONDS
        return min(self._now - watched.moved_at, seconds_since_stop) > allowed


def percentile_99(times: Iterable[float]) -> float:
    """The smallest of the times that at least 99% of them do not exceed."""
    ordered = sorted(times)
    return ordered[math.ceil(0.99 * len(ordered)) - 1]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is known of a rank when some are late."""

    rank: int
    phase: str
    done: int
    seconds: float
    """How long it has been silent."""
    stopped: bool
    """Whether a signal or a debugger has stopped it."""
    in_collective: bool | None
    """Whether its main thread is waiting in a collective; None if its stack could not be read."""


def suspect(looks: Sequence[Look]) -> Look | None:
    """The rank that the others wait for; None if nothing sets one apart, as when all wait for another pod.

    A stopped rank comes first; then, if ranks differ in steps or phase, the one with the fewest steps done; else the
    only one that is not in a collective.
    """
    stopped = [look for look in looks if look.stopped]
    if stopped:
        return stopped[0]
    if not looks:
        return None
    behind = min(looks, key=lambda look: (look.done, -look.seconds))
    if any((look.done, look.phase) != (behind.done, behind.phase) for look in looks):
        return behind
    elsewhere = [look for look in looks if look.in_collective is False]
    if len(looks) == 1 or (len(elsewhere) == 1 and all(look.in_collective is not None for look in looks)):
        return elsewhere[0] if elsewhere else None
    return None


def _late(rank: int, watched: _Watched, now: float, bound: float) -> Late:
    beat = watched.beat
    return Late(
        rank=rank, phase=beat.phase, done=beat.done, unit=beat.unit, seconds=now - watched.moved_at, bound=bound
    )
