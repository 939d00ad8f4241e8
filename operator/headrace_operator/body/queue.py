"""One work queue for all runs. A key is queued at most once and handled by one worker at a time.

In: keys from watches, the progress endpoint and their own deadlines. Out: calls of ``work``. A key added while it is
being handled is handled again afterwards; one that fails is retried with exponential back-off.
"""

import asyncio
import heapq
import logging
import random
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from headrace_operator.brain.backoff import backoff_seconds

logger = logging.getLogger(__name__)

_WAITS = {"first_seconds": 0.5, "longest_seconds": 60.0}

K = TypeVar("K", bound=Hashable)


class Retry(Exception):
    """Work that cannot be done yet, for a known reason; retried later."""


class Deadlines(Generic[K]):
    """Deadlines by key; the earliest one set for a key wins."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        self._due: dict[K, float] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._due)

    def set(self, key: K, at: float) -> None:
        """Set a key's deadline, unless it has an earlier one."""
        if at < self._due.get(key, float("inf")):
            self._due[key] = at
            self._count += 1
            heapq.heappush(self._heap, (at, self._count, key))

    def clear(self, key: K) -> None:
        self._due.pop(key, None)

    def next(self) -> float | None:
        """The earliest deadline."""
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop(self, now: float) -> list[K]:
        """Remove and return the keys that are due."""
        due: list[K] = []
        while (at := self.next()) is not None and at <= now:
            due.append(heapq.heappop(self._heap)[2])
            self.clear(due[-1])
        return due


class WorkQueue(Generic[K]):
    """Keys waiting to be handled.

    Args:
        work: handles a key; returns the seconds until it must be handled again, or None.
    """

    def __init__(self, work: Callable[[K], Awaitable[float | None]]) -> None:
        self._work = work
        self._waiting: OrderedDict[K, None] = OrderedDict()
        self._working: set[K] = set()
        self._again: set[K] = set()
        self._failures: Counter[K] = Counter()
        self._deadlines: Deadlines[K] = Deadlines()
        self._timer: asyncio.TimerHandle | None = None
        self._ready = asyncio.Semaphore(0)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_deadlines(self) -> int:
        """Keys with a pending deadline."""
        return len(self._deadlines)

    def add(self, key: K) -> None:
        """Handle a key soon."""
        if key in self._working:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting[key] = None
            self._ready.release()

    def add_after(self, key: K, seconds: float) -> None:
        """Handle a key after a delay, unless something adds it sooner."""
        self._deadlines.set(key, asyncio.get_running_loop().time() + seconds)
        self._set_timer()

    async def run(self, *, num_workers: int) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as workers:
                for i in range(num_workers):
                    workers.create_task(self._serve(), name=f"worker {i}")
        finally:
            if self._timer is not None:
                self._timer.cancel()

    async def _serve(self) -> None:
        while True:
            await self._ready.acquire()
            key, _ = self._waiting.popitem(last=False)
            self._working.add(key)
            self._deadlines.clear(key)
            try:
                await self._do(key)
            finally:
                self._working.discard(key)
            if key in self._again:
                self._again.discard(key)
                self.add(key)

    async def _do(self, key: K) -> None:
        try:
            seconds = await self._work(key)
        except Exception as error:
            self._failures[key] += 1
            seconds = backoff_seconds(self._failures[key], **_WAITS, jitter=random.random())
            unexpected, said = not isinstance(error, Retry), str(error) or type(error).__name__
            logger.warning("%s: %s; retrying in %.1f s", key, said, seconds, exc_info=unexpected)
        else:
            self._failures.pop(key, None)
        if seconds is not None:
            self.add_after(key, seconds)

    def _set_timer(self) -> None:
        """Keep a single timer for all deadlines."""
        at = self._deadlines.next()
        if self._timer is not None:
            if at is not None and not self._timer.cancelled() and self._timer.when() <= at:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at, self._ring) if at is not None else None

    def _ring(self) -> None:
        self._timer = None
        for key in self._deadlines.pop(asyncio.get_running_loop().time()):
            self.add(key)
        self._set_timer()
