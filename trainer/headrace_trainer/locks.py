"""File locks between the processes of a node. The kernel releases those of a dead process."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from headrace_trainer import board

_LOCK_SECONDS = 0.2


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file. Waiting counts as progress: only the holder can hang."""
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                board.beat()
                time.sleep(_LOCK_SECONDS)
        yield
