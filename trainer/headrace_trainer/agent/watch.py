"""Which rank hangs, and which one must not be waited for any longer: decided from what ranks report. Pure.

In: every rank's newest beat, and a clock. Out: ``Late`` ranks, with the bound that each has passed. A rank may be silent
for five times as long as nearly all of its own steps took, and at least a minute; where it has no such record, ten
minutes.
"""

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

RUNNING = "Running"
LAUNCHER = -1
"""Stands for the launcher among the ranks that are watched."""
_SAVING = frozenset({"Saving", "Stopping"})
"""Phases in which a rank that was asked to stop is doing so."""
_BEFORE_WORK = frozenset({"Starting", "Loading"})
"""Phases in which there is nothing to save yet."""

_FACTOR = 5.0
_SHORTEST_SECONDS = 60.0
_UNKNOWN_SECONDS = 120.0
"""Times ``_FACTOR``, for a phase whose times are not known yet."""
_KNOWN = 3
"""Times from which a phase is known."""
_KEPT = 200
ANSWER_SECONDS = 10.0
"""To answer a request to stop, for a rank whose steps are short."""
_LONGEST_TICK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank's slot says now."""

    beats: int
    reports: int
    phase: str = "Starting"
    done: int = 0
    unit: str = "steps"


@dataclass(frozen=True, kw_only=True)
class Late:
    """A rank that is silent for longer than it may be."""

    rank: int
    phase: str
    done: int
    unit: str
    seconds: float
    """How long it has been silent."""
    bound: float
    """How long it may be."""


@dataclass(kw_only=True)
class _Watched:
    """One rank, since it was first seen."""

    beat: Beat
    moved_at: float
    """When it last moved."""
    reported_at: float
    times: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=_KEPT)))
    """Seconds that units of a phase took. The first of each is left out: it compiles, connects and fills caches."""
    seen: set[str] = field(default_factory=set)


class Watch:
    """The ranks of one pod.

    Time in which the agent itself did not run does not count: after a pause of the whole machine nobody is late.

    Args:
        on_stall: ``restartPolicy.onStall`` in seconds.
    """

    def __init__(self, *, on_stall: float | None = None) -> None:
        self._on_stall = on_stall
        self._ranks: dict[int, _Watched] = {}
        self._now = 0.0
        self._clock: float | None = None

    def tick(self, clock: float) -> None:
        """Let the time pass.

        Args:
            clock: seconds from any origin.
        """
        if self._clock is not None:
            self._now += min(clock - self._clock, _LONGEST_TICK_SECONDS)
        self._clock = clock

    def see(self, rank: int, beat: Beat) -> None:
        """Take over what a rank's slot says."""
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
        """A rank has ended."""
        self._ranks.pop(rank, None)

    def excuse(self, rank: int) -> None:
        """A silent rank is at work after all: its time begins again."""
        self._ranks[rank].moved_at = self._now

    def late(self) -> list[Late]:
        """Ranks that are silent for too long, the one that has been so for longest first."""
        found = [(rank, w, self.bound(rank)) for rank, w in self._ranks.items()]
        late = [_late(rank, w, self._now, bound) for rank, w, bound in found if self._now - w.moved_at > bound]
        return sorted(late, key=lambda entry: -entry.seconds)

    def all(self) -> list[Late]:
        """Every rank, late or not, by number."""
        return [_late(rank, w, self._now, self.bound(rank)) for rank, w in sorted(self._ranks.items())]

    def bound(self, rank: int) -> float:
        """Seconds that a rank may be silent in the phase that it is in."""
        watched = self._ranks[rank]
        phase, times = watched.beat.phase, watched.times[watched.beat.phase]
        if len(times) < _KNOWN:
            return _FACTOR * (self._on_stall or _UNKNOWN_SECONDS)
        if phase == RUNNING and self._on_stall is not None:
            return self._on_stall
        return max(self._on_stall or _SHORTEST_SECONDS, _FACTOR * percentile_99(times))

    def has_nothing_to_save(self) -> bool:
        """Whether no rank has begun its work."""
        return all(w.beat.phase in _BEFORE_WORK for rank, w in self._ranks.items() if rank != LAUNCHER)

    def unanswered(self, *, seconds_since_stop: float) -> list[int]:
        """Ranks that were asked to stop, and neither stop nor move.

        A rank that is saving, or is in a phase whose times are not known, is given all of the grace period, which is
        not counted here. One that takes steps must end one of them, so that longer steps are given longer.
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
    """The smallest of some times that 99% of them do not exceed."""
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
    """Whether a signal or a debugger holds it."""
    in_collective: bool | None
    """Whether its main thread waits for other ranks; None where its stack could not be read."""


def suspect(looks: Sequence[Look]) -> Look | None:
    """The rank that the others wait for; None where nothing tells them apart, as when all wait for another pod.

    A rank that is held is one. Else it is the only one that is behind, in steps or phases. Else, where all are at the
    same place, it is the only one that does not wait in a collective.
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
