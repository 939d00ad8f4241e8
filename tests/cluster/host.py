"""Running commands and waiting for things on this host: the only place that starts processes to completion."""

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class ClusterError(RuntimeError):
    """ClusterError says what failed and where to look; the command line prints it without a traceback."""


def run(argv: Sequence[str | Path], *, stdin: str | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return its standard output; its standard error becomes the error's text."""
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(words, input=stdin, env=env, text=True, capture_output=True, check=True)
    except subprocess.CalledProcessError as error:
        output = (error.stderr or error.stdout).strip()
        raise ClusterError(f"`{' '.join(words)}` exited with {error.returncode}: {output}") from error
    return done.stdout


def succeeds(argv: Sequence[str | Path]) -> bool:
    """Whether a command exits with 0."""
    return subprocess.run([str(word) for word in argv], capture_output=True, check=False).returncode == 0


def wait_until(ready: Callable[[], bool], what: str, *, timeout_seconds: float, log: Path | None = None) -> None:
    """Poll until `ready` holds; a time-out names what was awaited and the log to read."""
    deadline = time.monotonic() + timeout_seconds
    while not ready():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not within {timeout_seconds:g} s" + (f"; read {log}" if log else ""))
        time.sleep(0.1)
