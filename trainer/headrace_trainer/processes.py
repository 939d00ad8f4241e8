"""Nothing outlives what started it: death signals from parent to child, adopted orphans, and the end of a whole tree.

A process that its parent leaves behind, in whatever session, is adopted by the nearest ancestor that asked for orphans.
So everything that a rank ever started stays below the agent, where ``kill_tree`` finds it.
"""

import contextlib
import ctypes
import logging
import os
import signal
import time
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)

log = logging.getLogger("headrace")


def die_with_parent(*, on: bool = True) -> None:
    """Have the kernel kill this process when its parent dies, however it dies. For ``preexec_fn`` and for ranks.

    Args:
        on: False takes it back.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if on else 0)


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans, so that they stay in its tree. Children must be reaped."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def let_stacks_be_read() -> None:
    """Let a debugger of the same user attach, where the kernel would allow that to ancestors alone (Yama)."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY)


def name_process(name: str) -> None:
    """What ``ps -o comm`` and ``top`` call this process; 15 characters are kept."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


def is_stopped(pid: int) -> bool:
    """Whether a process is held by a signal (SIGSTOP, SIGTSTP) or by a debugger; False for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] in "Tt"


def tree(pid: int) -> list[psutil.Process]:
    """The live descendants of a process, zombies left out."""
    try:
        found = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [p for p in found if _is_alive(p)]


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its live descendants so far."""
    spent = 0.0
    with contextlib.suppress(psutil.Error):
        for process in (psutil.Process(pid), *tree(pid)):
            with contextlib.suppress(psutil.Error):
                spent += sum(process.cpu_times()[:4])  # its own, and of children that have ended
    return spent


def kill_tree(pid: int, *, seconds: float = 5.0) -> None:
    """Kill every descendant of a process until none is left: some may start others while they are being killed.

    Args:
        pid: the process at the root, which is spared.
        seconds: how long to insist; a process that waits for a device or a file server cannot be killed.
    """
    deadline = time.monotonic() + seconds
    while left := tree(pid):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if time.monotonic() > deadline:
            log.error("not killed in %.0f s: processes %s", seconds, ", ".join(str(p.pid) for p in left))
            return
        time.sleep(0.01)


def reap() -> list[tuple[int, int]]:
    """Collect every child that has ended: (process id, exit code, negative for a signal), in the order of their ends."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    return ended


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
