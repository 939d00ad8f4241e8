"""Nothing outlives what started it: death signals from parent to child, and the end of a whole session."""

import ctypes
import os
import signal

import psutil

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however it dies. For ``preexec_fn`` and for ranks."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_session(leader: int) -> None:
    """Kill every process of a session: forked checkpoint writers survive their killed rank otherwise.

    Args:
        leader: the process id that ``start_new_session`` gave the session.
    """
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                process.kill()
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
