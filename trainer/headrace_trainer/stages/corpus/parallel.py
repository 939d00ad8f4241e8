"""Doing one thing to many items on the processors that this pod may use."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cpus() -> int:
    """Processors that this process may keep busy: its affinity, and the container's CPU limit."""
    allowed = len(os.sched_getaffinity(0))
    if not _QUOTA.is_file():
        return allowed
    quota, period = _QUOTA.read_text().split()
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def map_in_order(function: Callable[[T], R], items: Sequence[T], *, workers: int) -> Iterator[R]:
    """``function`` of every item, in the items' order; the first failing item's error is raised.

    Args:
        function: what is done; with several workers it and the items are pickled.
        items: what it is done to.
        workers: processes; 1 works in this one.
    """
    if min(workers, len(items)) <= 1:
        yield from map(function, items)
        return
    # Not fork: threads of object storage clients may hold locks that a forked child would wait for.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max_workers=min(workers, len(items)), mp_context=context)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
