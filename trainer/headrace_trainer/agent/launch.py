"""The agent's side of the launcher: start it, release the ranks, learn how each ended, kill everything."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace_api.contract import ResolvedStage
from headrace_api.stages import RunsAs
from headrace_trainer.agent.launcher import Ranks
from headrace_trainer.agent.settings import Settings, default_threads
from headrace_trainer.board import BOARD_VARIABLE, Board
from headrace_trainer.processes import adopt_orphans, kill_tree, reap
from headrace_trainer.stage import EVIDENCE

_NCCL_EVENTS = 2000
"""Collectives per rank kept by NCCL's flight recorder."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a rank, or the launcher, ended."""

    rank: int | None
    """Global rank; None for the launcher."""
    code: int
    """Exit code; negative for a signal."""


class Launch:
    """One launch of a pod's ranks, as a context manager. On exit none of their processes is left.

    Attributes:
        plan: the pod's ranks.
        slots: each rank's slot on the board, by global rank.
        pids: process ids of the live ranks, by global rank.
        ended: the ranks that have ended, in order.
        error: why the launcher could not start the ranks, as (type, message), or None.
    """

    def __init__(self, stage_file: Path, resolved: ResolvedStage, settings: Settings) -> None:
        self.plan = plan_ranks(resolved, index=settings.index)
        board = Board.create(self.plan.count)
        self.slots = {self.plan.first + i: slot for i, slot in enumerate(board.slots)}
        self.pids: dict[int, int] = {}
        self.ended: list[Ended] = []
        self.error: tuple[str, str] | None = None
        self._unread = b""
        adopt_orphans()
        self._control, theirs = socket.socketpair()
        with theirs:
            words = [str(theirs.fileno()), str(stage_file), json.dumps(asdict(self.plan))]
            self._launcher = subprocess.Popen(
                [sys.executable, "-m", "headrace_trainer.agent.launcher", *words],
                env=rank_environment(resolved, settings, board=board),
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), board.fd),
                start_new_session=True,
            )

    @property
    def launcher(self) -> int:
        return self._launcher.pid

    def start_ranks(self) -> None:
        """Let the ranks start as soon as the launcher has finished its imports."""
        with contextlib.suppress(BrokenPipeError):  # it has exited already; poll reports that
            self._control.sendall(b"g")
        self._control.setblocking(False)

    def poll(self) -> bool:
        """Read the launcher's messages. Returns whether the launcher, and so every rank, has ended."""
        over = self._launcher.poll() is not None
        self._hear()
        if over and self._launcher.returncode != 0 and self.error is None:
            self.ended.append(Ended(rank=None, code=self._launcher.returncode))
        return over

    def kill(self) -> None:
        """Kill the launcher, the ranks and everything they started."""
        kill_tree(os.getpid())
        self._launcher.wait()
        reap()

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._control.close()

    def _hear(self) -> None:
        try:
            while data := self._control.recv(65536):
                self._unread += data
        except (BlockingIOError, ConnectionResetError):
            pass
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, said: dict[str, Any]) -> None:
        match said:
            case {"rank": rank, "pid": pid}:
                self.pids[rank] = pid
            case {"rank": rank, "code": code}:
                self.pids.pop(rank, None)
                self.ended.append(Ended(rank=rank, code=code))
            case {"error": kind, "message": message}:
                self.error = (kind, message)


def plan_ranks(resolved: ResolvedStage, *, index: int) -> Ranks:
    """The ranks of a pod.

    Numbered by the pod's index, so that a rank keeps its number, and with it its part of the model, in every attempt.
    """
    stage = resolved.stage
    if stage.config.RUNS_AS is not RunsAs.GANG:
        return Ranks(module=None, count=1, first=0, world=0)
    return Ranks(
        module=f"headrace_trainer.stages.{stage.kind}.stage",
        count=stage.compute.ranks,
        first=index * stage.compute.ranks,
        world=stage.compute.world,
    )


def rank_environment(resolved: ResolvedStage, settings: Settings, *, board: Board) -> dict[str, str]:
    """The ranks' environment: the agent's, with libraries kept offline and threads divided among the ranks."""
    env = dict(os.environ)
    env["HEADRACE_SCRATCH"] = str(settings.scratch)
    env["JOB_COMPLETION_INDEX"] = str(settings.index)
    env[BOARD_VARIABLE] = f"/proc/self/fd/{board.fd}"
    env["MASTER_ADDR"], env["MASTER_PORT"] = settings.master_addr, str(settings.master_port)
    env.setdefault("OMP_NUM_THREADS", str(default_threads(resolved.stage.compute.ranks)))
    env["TMPDIR"] = str(settings.scratch)  # so that libraries' leftovers go with the attempt
    env["HF_HUB_OFFLINE"] = "1"
    env["TOKENIZERS_PARALLELISM"] = env.get("TOKENIZERS_PARALLELISM", "true")
    env["PYTHONUNBUFFERED"] = "1"
    if resolved.stage.config.RUNS_AS is RunsAs.GANG:
        env.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would start before the ranks are forked
    if resolved.stage.compute.gpus_per_node:
        env |= flight_recorder(settings.scratch)
    return env


def flight_recorder(scratch: Path) -> dict[str, str]:
    """Variables that make NCCL record its latest collectives and dump them when one times out.

    Each under both names: torch 2.11 reads the older ones.
    """
    where = str(scratch / EVIDENCE / "nccl-")
    return {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": str(_NCCL_EVENTS),
        "TORCH_FR_BUFFER_SIZE": str(_NCCL_EVENTS),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": where,
        "TORCH_FR_DUMP_TEMP_FILE": where,
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(scratch / "nccl-pipe-"),
    }
