"""The launcher imports what every rank needs once, forks the ranks, and reports how each one ended.

``python -m headrace_trainer.agent.launcher FD STAGE_FILE RANKS``. The agent starts it and holds the other end of the
socket FD. The launcher sends one JSON object per line; the agent sends one byte, when the ranks may start: during the
imports it checks whether there is anything to do at all. The launcher stays the ranks' parent. It adopts their orphans,
kills those when the last rank has ended, and kills everything at once if the agent dies.
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
    """What to import before forking the ranks. None gives each rank its own Python process; so does anything a fork
    would break: threads, whose locks stay locked in the child, or an initialised CUDA."""
    count: int
    first: int
    """Global rank of the pod's first rank."""
    world: int
    """Ranks in the gang; 0 if ranks are independent."""


def main(argv: list[str]) -> None:
    """Import, wait for the go-ahead, fork, and stay until the last rank has ended."""
    control, stage_file = socket.socket(fileno=int(argv[0])), argv[1]
    plan = Ranks(**json.loads(argv[2]))
    # Safe here: there are no children yet that would outlive this process.
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
    """Import a module. On failure, report it to the agent and exit."""
    os.environ[_LOOK_WITHOUT_STARTING_CUDA] = "1"
    try:
        importlib.import_module(module)
    except Exception as error:
        traceback.print_exc()
        _tell(control, error=type(error).__name__, message=str(error)[:1000])
        sys.exit(_FAILED)
    del os.environ[_LOOK_WITHOUT_STARTING_CUDA]
    gc.collect()
    gc.freeze()  # imports are never garbage: keeps the ranks' collectors from touching, and so copying, their pages


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
        print("an import started threads or CUDA: this rank imports again", file=sys.stderr, flush=True)
    if not is_fit:
        os.execv(sys.executable, [sys.executable, "-m", "headrace_trainer.stage", stage_file])
    from headrace_trainer.stage import main as run_rank

    run_rank([stage_file])


def _can_use_cuda() -> bool:
    """Whether a forked rank can use CUDA: not if an import initialised it before the fork."""
    if "torch" not in sys.modules:
        return True
    import torch

    from headrace_trainer.engine import device

    return not (device.has_cuda() and torch.cuda._is_in_bad_fork())


def _stay(control: socket.socket, wake: int, pids: dict[int, int]) -> None:
    """Report every rank that ends. Returns when all have, or when the agent is gone."""
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
    """A file descriptor that becomes readable when a child ends."""
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writable)
    return readable


def _tell(control: socket.socket, **said: Any) -> None:
    with contextlib.suppress(OSError):  # the agent is gone; the next select notices
        control.sendall(json.dumps(said).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # skips the imported libraries' exit handlers, some of which print
