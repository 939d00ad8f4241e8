"""The work queue: a key is queued once, handled by one worker at a time, and retried after an error or a deadline."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from headrace_operator.body.queue import Deadlines, Retry, WorkQueue
from headrace_operator.brain.backoff import backoff_seconds


def work(
    do: Callable[[str], Awaitable[float | None]], script: Callable[[WorkQueue[str]], Awaitable[None]], workers: int = 4
) -> None:
    """Run a queue while a script adds to it."""

    async def main() -> None:
        queue: WorkQueue[str] = WorkQueue(do)
        serving = asyncio.create_task(queue.run(num_workers=workers))
        await script(queue)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    asyncio.run(asyncio.wait_for(main(), timeout=10))


def test_a_key_waits_once_however_often_it_is_added() -> None:
    done: list[str] = []

    async def do(key: str) -> None:
        done.append(key)

    async def script(queue: WorkQueue[str]) -> None:
        for key in ("a", "b", "a", "a", "b"):
            queue.add(key)
        await asyncio.sleep(0.05)

    work(do, script)
    assert sorted(done) == ["a", "b"]


def test_a_key_is_worked_on_by_one_worker_and_again_if_it_changed_meanwhile() -> None:
    at_once, most, times = 0, 0, 0

    async def do(_: str) -> None:
        nonlocal at_once, most, times
        at_once, times = at_once + 1, times + 1
        most = max(most, at_once)
        await asyncio.sleep(0.02)
        at_once -= 1

    async def script(queue: WorkQueue[str]) -> None:
        queue.add("a")
        await asyncio.sleep(0.01)
        for _ in range(5):
            queue.add("a")
        await asyncio.sleep(0.2)

    work(do, script)
    assert (most, times) == (1, 2)


def test_different_keys_are_worked_on_side_by_side() -> None:
    both = asyncio.Event()
    inside: set[str] = set()

    async def do(key: str) -> None:
        inside.add(key)
        if len(inside) == 2:
            both.set()
        await both.wait()

    async def script(queue: WorkQueue[str]) -> None:
        queue.add("a")
        queue.add("b")
        await both.wait()

    work(do, script)
    assert inside == {"a", "b"}


@pytest.mark.parametrize("error", [Retry("not yet"), RuntimeError("a bug")])
def test_work_that_fails_comes_back_and_hurts_nobody_else(error: Exception) -> None:
    done: list[str] = []
    again = asyncio.Event()

    async def do(key: str) -> None:
        done.append(key)
        if key == "bad" and done.count("bad") == 1:
            raise error
        if key == "bad":
            again.set()

    async def script(queue: WorkQueue[str]) -> None:
        queue.add("bad")
        queue.add("good")
        await again.wait()

    work(do, script)
    assert (done.count("bad"), done.count("good")) == (2, 1)


def test_a_key_comes_back_at_its_deadline_and_earlier_if_something_happens() -> None:
    times: list[float] = []

    async def do(_: str) -> float | None:
        times.append(asyncio.get_running_loop().time())
        return {1: 0.1, 2: 60.0}.get(len(times))

    async def script(queue: WorkQueue[str]) -> None:
        queue.add("a")
        await asyncio.sleep(0.2)
        assert len(times) == 2 and queue.num_deadlines == 1
        queue.add("a")
        await asyncio.sleep(0.05)
        assert len(times) == 3 and queue.num_deadlines == 0

    work(do, script)
    assert 0.09 < times[1] - times[0] < 0.2


def test_waits_double_up_to_a_minute() -> None:
    bounds = {"first_seconds": 0.5, "longest_seconds": 60.0}
    assert [backoff_seconds(n, **bounds) for n in range(10)] == [0, 0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff_seconds(10_000, **bounds) == 60
    assert backoff_seconds(3, **bounds, jitter=1.0) == 1.0


def test_of_several_deadlines_of_a_key_the_earliest_counts() -> None:
    deadlines: Deadlines[str] = Deadlines()
    for key, at in (("a", 5.0), ("b", 3.0), ("a", 2.0), ("a", 9.0), ("c", 1.0)):
        deadlines.set(key, at)
    deadlines.clear("c")
    assert deadlines.next() == 2.0
    assert deadlines.pop(4.0) == ["a", "b"]
    assert deadlines.next() is None and len(deadlines) == 0
