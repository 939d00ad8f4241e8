"""The launcher: imports what every rank needs once, then forks the ranks, and says how each of them ended.

``python -m headrace_trainer.agent.launcher FD STAGE_FILE RANKS``; the agent starts it, and holds the other end of the
socket FD. One JSON object a line goes to the agent; one line comes from it, when the ranks may start: until then the
agent looks whether there is anything to do at all. The launcher is the ranks' parent for as long as they live. It
adopts what they leave behind, kills all of it when the last rank has ended, and everything at once when the agent dies.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from headrace_trainer.processes import adopt_orphans, die_with_parent, kill_tree, name_process, reap

_FAILED = 70
_LOOK_WITHOUT_STARTING_CUDA = "PYTORCH_NVML_BASED_CUDA_CHECK"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The ranks of one pod."""

    module: str | None
    """What to import before the ranks are forked. None gives each rank a Python of its own, as does what a fork would
    break: threads, whose locks stay locked in the child, and a CUDA that has been started."""
    count: int
    first: int
    """The number of the pod's first rank in the gang."""
    world: int
    """Ranks of the gang; 0 where ranks know nothing of one another."""


def main(argv: list[str]) -> None:
    """Import, wait for the word, fork, and stay until the last rank has ended."""
    control, stage_file = socket.socket(fileno=int(argv[0])), argv[1]
    plan = Ranks(**json.loads(argv[2]))
    # Nothing has been started yet that would have to be killed first.
    die_with_parent()
    name_process("launcher")
    if plan.module is not None:
        _import(plan.module, control)
    adopt_orphans()
    wake = _wake_on_child()
    if not control.recv(1):
        return
    die_with_parent(on=False)
    pids = {_start(plan, i, stage_file, control): plan.first + i for i in range(plan.count)}
    for pid, rank in pids.items():
        _tell(control, rank=rank, pid=pid)
    _stay(control, wake, pids)


def _import(module: str, control: socket.socket) -> None:
    """Import a module and what it needs; a failure is told and ends this process."""
    os.environ[_LOOK_WITHOUT_STARTING_CUDA] = "1"
    try:
        importlib.import_module(module)
    except Exception as error:
        traceback.print_exc()
        _tell(control, error=type(error).__name__, message=str(error)[:1000])
        sys.exit(_FAILED)
    del os.environ[_LOOK_WITHOUT_STARTING_CUDA]
    gc.collect()
    gc.freeze()  # what was imported is never garbage: the ranks' collectors need not touch, and so copy, its pages


def _start(plan: Ranks, i: int, stage_file: str, control: socket.socket) -> int:
    parent, alone = os.getpid(), sum(1 for _ in Path("/proc/self/task").iterdir()) == 1
    pid = os.fork()
    if pid == 0:
        try:
            control.close()
            _become_rank(plan, i, stage_file, parent=parent, alone=alone)
        except BaseException:
            traceback.print_exc()
        os._exit(_FAILED)
    return pid


def _become_rank(plan: Ranks, i: int, stage_file: str, *, parent: int, alone: bool) -> NoReturn:
    die_with_parent()
    if os.getppid() != parent:
        os._exit(_FAILED)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if plan.world:
        os.environ |= {
            "RANK": str(plan.first + i),
            "WORLD_SIZE": str(plan.world),
            "LOCAL_RANK": str(i),
            "LOCAL_WORLD_SIZE": str(plan.count),
        }
    is_fit = plan.module is not None and alone and _can_use_cuda()
    if plan.module is not None and not is_fit:
        print("threads or CUDA were started while importing: this rank imports once more", file=sys.stderr, flush=True)
    if not is_fit:
        os.execv(sys.executable, [sys.executable, "-m", "headrace_trainer.stage", stage_file])
    from headrace_trainer.stage import main as run_rank

    run_rank([stage_file])


def _can_use_cuda() -> bool:
    """Whether a forked rank can: not if something that was imported has started CUDA before the fork."""
    if "torch" not in sys.modules:
        return True
    import torch

    from headrace_trainer.engine import device

    return not (device.has_cuda() and torch.cuda._is_in_bad_fork())


def _stay(control: socket.socket, wake: int, pids: dict[int, int]) -> None:
    """Tell of every rank that ends; return when all have, or when the agent is gone."""
    while pids:
        readable, _, _ = select.select([control, wake], [], [])
        if control in readable and not control.recv(1):
            break
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 1024)
        for pid, code in reap():
            if pid in pids:
                _tell(control, rank=pids.pop(pid), code=code)
    kill_tree(os.getpid())


def _wake_on_child() -> int:
    """A file descriptor that can be read when a child has ended."""
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writable)
    return readable


def _tell(control: socket.socket, **said: Any) -> None:
    with contextlib.suppress(OSError):  # the agent is gone, which the next look at the socket tells
        control.sendall(json.dumps(said).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # what was imported has nothing to say at its end, and some of it would
