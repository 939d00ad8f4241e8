"""Locks between the processes of a node, on files; the kernel gives up those of a process that dies."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from headrace_trainer import board

_LOCK_SECONDS = 0.2


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file. Whoever waits for it beats: it is the holder that may hang."""
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                board.beat()
                time.sleep(_LOCK_SECONDS)
        yield
