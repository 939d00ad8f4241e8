"""``headrace stop``: ask the process that runs a run to suspend it; stop everything else from here."""

import contextlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import psutil

from headrace_cli.attempts import LocalAttempts
from headrace_cli.home import Busy, RunFolder
from headrace_cli.live import Rest, as_it_is
from headrace_cli.problem import ExitCode, Problem
from headrace_operator.brain.observed import LIVE, Attempt

_POLL_SECONDS = 0.1
_MARGIN_SECONDS = 60.0
"""On top of the agents' grace period, for a process that is busy with a slow disk or a long log line."""


def stop_run(folder: RunFolder) -> tuple[Attempt, ...]:
    """Stop a run after a checkpoint, including its server, and write a status that says so.

    Returns:
        The attempts that were running.

    Raises:
        Problem: the process that runs it does not release it.
        Damaged: the status is damaged. Everything is stopped nonetheless.
    """
    attempts = LocalAttempts(folder=folder.attempts)
    lived = _live(attempts)
    with _taken_over(folder, timeout_seconds=attempts.grace_seconds + _MARGIN_SECONDS):
        lived = lived or _live(attempts)  # the holder may have started one just before we asked
        attempts.end_all(at_once=lambda: False)
        stored = folder.status()
        now = as_it_is(stored, attempts.observe(), now=datetime.now(UTC), rest=Rest.STOPPED)
        if now != stored:
            folder.save_status(now, durable=True)
    return lived


def _live(attempts: LocalAttempts) -> tuple[Attempt, ...]:
    return tuple(a for a in attempts.observe() if a.state in LIVE)


@contextmanager
def _taken_over(folder: RunFolder, *, timeout_seconds: float) -> Iterator[None]:
    """The run's lock, once its holder has suspended the run."""
    deadline, asked = time.monotonic() + timeout_seconds, None
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(folder.locked())
            except Busy as error:
                holder = folder.holder()
                if time.monotonic() > deadline:
                    raise _stubborn(folder, holder) from error
                asked = _ask(holder, asked=asked)
                time.sleep(_POLL_SECONDS)
                continue
            yield
            return


def _ask(holder: psutil.Process | None, *, asked: psutil.Process | None) -> psutil.Process | None:
    """Ask a holder once. Also wakes one that was stopped with Ctrl-Z."""
    if holder is None or holder == asked:
        return asked
    try:
        holder.send_signal(signal.SIGTERM)
        holder.send_signal(signal.SIGCONT)
    except psutil.NoSuchProcess:
        return asked
    except psutil.AccessDenied as error:
        raise Problem(
            f"process {holder.pid}, which runs it, belongs to {holder.username()}: stop it as that user"
        ) from error
    return holder


def _stubborn(folder: RunFolder, holder: psutil.Process | None) -> Problem:
    who = f"process {holder.pid}" if holder is not None else "a process not visible from here"
    return Problem(
        f"{folder.name}: {who} was asked to suspend it and still runs it; kill that process, then stop the run again",
        code=ExitCode.FAILED,
    )
