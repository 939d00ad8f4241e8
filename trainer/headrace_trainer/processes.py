"""Nothing outlives what started it: parent-death signals, adopted orphans, and killing of whole trees.

An orphan, whatever its session, is adopted by the nearest ancestor that asked for orphans. So everything a rank ever
started stays below the agent, where ``kill_tree`` finds it.
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
    """Have the kernel kill this process when its parent dies, however that happens. For ``preexec_fn`` and for ranks.

    Args:
        on: False undoes it.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if on else 0)


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants, so that they stay in this process's tree. Children must be reaped."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def let_stacks_be_read() -> None:
    """Let any process of the same user attach a debugger; by default Yama may allow only ancestors to."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY)


def name_process(name: str) -> None:
    """Set the name shown by ``ps -o comm`` and ``top``; 15 characters are kept."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


def is_stopped(pid: int) -> bool:
    """Whether a signal (SIGSTOP, SIGTSTP) or a debugger has stopped a process. False if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] in "Tt"


def tree(pid: int) -> list[psutil.Process]:
    """The live descendants of a process, without zombies."""
    try:
        found = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [p for p in found if _is_alive(p)]


def cpu_seconds(pid: int) -> float:
    """CPU time used so far by a process and its live descendants."""
    spent = 0.0
    with contextlib.suppress(psutil.Error):
        for process in (psutil.Process(pid), *tree(pid)):
            with contextlib.suppress(psutil.Error):
                spent += sum(process.cpu_times()[:4])  # its own, and of ended children
    return spent


def kill_tree(pid: int, *, seconds: float = 5.0) -> None:
    """Kill every descendant of a process until none is left: some may fork while they are being killed.

    Args:
        pid: the root process, which is spared.
        seconds: when to give up: a process in uninterruptible sleep cannot be killed.
    """
    deadline = time.monotonic() + seconds
    while left := tree(pid):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if time.monotonic() > deadline:
            log.error("failed to kill within %.0f s: processes %s", seconds, ", ".join(str(p.pid) for p in left))
            return
        time.sleep(0.01)


def reap() -> list[tuple[int, int]]:
    """Reap every ended child: (process id, exit code, negative for a signal), in the order they ended."""
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
