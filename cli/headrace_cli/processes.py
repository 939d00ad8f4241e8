"""Find the processes that belong to a folder of attempts, whoever started them, and kill them all.

An agent and its descendants carry ``HEADRACE_SCRATCH``, a path in the attempt's folder, in their environment. So
processes are found even if their record is lost, and a recycled process id is not mistaken for ours.
"""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from headrace_cli.problem import ExitCode, Problem

SCRATCH = "HEADRACE_SCRATCH"
_AGENT = "headrace_trainer.agent"
_KILL_SECONDS = 20.0
_POLL_SECONDS = 0.05


def agent(pid: int, folder: Path) -> psutil.Process | None:
    """The process, if it is alive and belongs to this attempt's folder."""
    try:
        process = psutil.Process(pid)
        return process if _lives(process) and _works_in(process, folder) else None
    except psutil.Error:
        return None


def find_agents(folder: Path) -> dict[int, psutil.Process]:
    """An attempt's agents by pod index, found among this machine's processes."""
    found: dict[int, psutil.Process] = {}
    for process in sorted(processes_in(folder), key=lambda p: p.create_time(), reverse=True):
        try:
            if _AGENT in process.cmdline() and os.getsid(process.pid) == process.pid:
                found[int(process.environ()["JOB_COMPLETION_INDEX"])] = process
        except (psutil.Error, ProcessLookupError, KeyError):
            continue
    return found


def processes_in(folder: Path) -> list[psutil.Process]:
    """Every live process started by an attempt in or below this folder."""
    return [p for p in _all() if _works_in(p, folder) and _lives(p)]


def kill_all(folder: Path) -> None:
    """Kill agents, their ranks and everything in their sessions; wait until none is left.

    Raises:
        Problem: a process did not die.
    """
    deadline = time.monotonic() + _KILL_SECONDS
    sessions: set[int] = set()
    while True:
        marked = processes_in(folder)
        sessions |= {s for p in marked if (s := _session(p)) not in (None, os.getsid(0))}
        left = marked + [p for p in _all() if _session(p) in sessions and p not in marked and _lives(p)]
        if not left:
            return
        if time.monotonic() > deadline:
            said = f"process {left[0].pid} cannot be killed: it may be waiting for a disk that does not respond"
            raise Problem(said, code=ExitCode.FAILED)
        _kill(left)
        psutil.wait_procs(left, timeout=_POLL_SECONDS)


def started(process: psutil.Process) -> str:
    """When a process started, in a form that setting the clock does not change."""
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return f"{process.create_time():.1f}"


def _all() -> Iterator[psutil.Process]:
    return (p for p in psutil.process_iter() if p.pid != os.getpid())


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        scratch = process.environ().get(SCRATCH)
    except psutil.Error:
        return False
    return scratch is not None and folder in Path(scratch).parents


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue
