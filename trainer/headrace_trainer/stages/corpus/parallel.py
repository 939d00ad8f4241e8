"""Map a function over items, using the CPUs available to this pod."""

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
    """CPUs that this process may use: its affinity, capped by the container's CPU limit."""
    allowed = len(os.sched_getaffinity(0))
    if not _QUOTA.is_file():
        return allowed
    quota, period = _QUOTA.read_text().split()
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def map_in_order(function: Callable[[T], R], items: Sequence[T], *, workers: int) -> Iterator[R]:
    """Apply ``function`` to every item, in order. Raises the error of the first item that fails.

    Args:
        function: pickled, like the items, if there are several workers.
        items: its arguments.
        workers: number of processes; 1 means this one.
    """
    if min(workers, len(items)) <= 1:
        yield from map(function, items)
        return
    # Not fork: a forked child could deadlock on locks held by object storage threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max_workers=min(workers, len(items)), mp_context=context)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
