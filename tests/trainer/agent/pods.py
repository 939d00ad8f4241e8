"""Pods for tests: real agents, launchers and ranks, whose stage follows a script."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from headrace_api.contract import Progress, ResolvedStage
from headrace_api.faults import Outcome

SCRIPTED = Path(__file__).with_name("scripted")
PATIENCE_SECONDS = 120.0


class Pods:
    """The agents of one attempt.

    Args:
        folder: for everything.
        script: rank -> acts, as ``scripted/acts.py`` explains.
        nodes: pods.
        ranks: ranks of each pod.
        kind: pretrain, a gang; or corpus, a task.
        fields: of ``ResolvedStage``.
        env: of the agents.
    """

    def __init__(
        self,
        folder: Path,
        script: dict[str, Any],
        *,
        nodes: int = 1,
        ranks: int = 2,
        kind: str = "pretrain",
        env: dict[str, str] | None = None,
        **fields: Any,
    ) -> None:
        self.folder, self.storage = folder, folder / "storage"
        self._script, self._env = script, env or {}
        stage = _stage(kind, nodes=nodes, ranks=ranks)
        resolved = {
            "run": "test",
            "stage": stage,
            "attempt": 1,
            "seed": 1,
            "hash": "a" * 64,
            "storage": {"uri": str(self.storage)},
            "outputUri": str(self.storage / kind),
            "progressUrl": f"file://{folder}/progress.json",
            **fields,
        }
        self.resolved = ResolvedStage.model_validate(resolved)
        (folder / "stage.json").write_text(self.resolved.model_dump_json(by_alias=True, exclude_none=True))
        self.port = _free_port()
        self.agents = [self._start(index) for index in range(nodes)]

    def start_again(self) -> None:
        """The same attempt once more, with one pod."""
        self.agents = [self._start(0)]

    @property
    def agent(self) -> "subprocess.Popen[bytes]":
        """The first pod's."""
        return self.agents[0]

    def scratch(self, index: int = 0) -> Path:
        """A pod's scratch folder."""
        return self.folder / f"scratch-{index}"

    def end(self, index: int = 0) -> Outcome:
        """Wait for a pod's end; what it said."""
        try:
            self.agents[index].wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end; the log ends with:\n{self.log(index)[-3000:]}") from None
        return Outcome.model_validate_json((self.folder / f"outcome-{index}.json").read_text())

    def log(self, index: int = 0) -> str:
        """What a pod printed."""
        return (self.folder / f"agent-{index}.log").read_text()

    def progress(self) -> Progress | None:
        """The newest report."""
        try:
            return Progress.model_validate_json((self.folder / "progress.json").read_text())
        except FileNotFoundError:
            return None

    def done(self) -> int:
        """Steps that rank 0 has reported."""
        progress = self.progress()
        return 0 if progress is None else progress.done

    def launcher(self, index: int = 0) -> psutil.Process | None:
        """A pod's launcher, once it is there."""
        found = [p for p in psutil.Process(self.agents[index].pid).children() if p.name() == "launcher"]
        return found[0] if found else None

    def rank(self, number: int) -> psutil.Process:
        """A rank, by its number in the gang."""
        named = f"rank {number}"
        return next(p for p in self.everything() if p.name() == named)

    def everything(self) -> list[psutil.Process]:
        """Every live process of these pods, agents included, wherever it is: all inherit the script."""
        return [p for p in psutil.process_iter() if p.pid != os.getpid() and self._is_ours(p)]

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Poll until something is so."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"never so; the log ends with:\n{self.log()[-3000:]}"
            time.sleep(0.05)

    def evidence(self, index: int = 0) -> dict[str, str]:
        """What was kept in storage: name -> text."""
        folder = self.storage / self.resolved.stage.name / "evidence" / "attempt-1" / f"pod-{index}"
        return {path.name: path.read_text() for path in sorted(folder.glob("*"))}

    def clear(self) -> None:
        """Kill whatever is left."""
        while left := self.everything():
            for process in left:
                process.kill()
        for agent in self.agents:
            agent.wait()

    def _start(self, index: int) -> "subprocess.Popen[bytes]":
        env = os.environ | {
            "PYTHONPATH": str(SCRIPTED),
            "HEADRACE_TEST_SCRIPT": json.dumps(self._script),
            "HEADRACE_TEST_FOLDER": str(self.folder),
            "HEADRACE_SCRATCH": str(self.scratch(index)),
            "HEADRACE_TERMINATION_FILE": str(self.folder / f"outcome-{index}.json"),
            "HEADRACE_MASTER_PORT": str(self.port),
            "JOB_COMPLETION_INDEX": str(index),
            "OMP_NUM_THREADS": "1",
            **self._env,
        }
        with (self.folder / f"agent-{index}.log").open("w") as log:
            command = [sys.executable, "-m", "headrace_trainer.agent", str(self.folder / "stage.json")]
            return subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            marked = process.environ().get("HEADRACE_TEST_FOLDER") == str(self.folder)
            return marked and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def stop(process: psutil.Process) -> None:
    """Hold a process with SIGSTOP."""
    process.send_signal(signal.SIGSTOP)


def _stage(kind: str, *, nodes: int, ranks: int) -> dict[str, Any]:
    if kind == "corpus":
        return {"name": kind, "corpus": {"sources": [{"uri": "/raw"}]}}
    world = nodes * ranks
    pretrain = {
        "from": {"shards": "shards"},
        "model": {"preset": "llama-nano"},
        "tokens": "1M",
        "sequenceLength": 128,
        "globalBatchSize": 4 * world,
        "precision": "fp32",
    }
    return {"name": kind, "compute": {"nodes": nodes, "ranksPerNode": ranks}, "pretrain": pretrain}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
