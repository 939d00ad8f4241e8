"""Attempts as local processes: one agent for each pod that a cluster would have.

In: a ``ResolvedStage``. Out: ``Attempt`` values for the planner. An attempt is a folder with ``stage.json``,
``processes.json``, and for each agent a log and an outcome; so a new ``headrace`` process sees what an old one started.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from pydantic import ValidationError

from headrace_api.contract import STAGE_FILE, Progress, ResolvedStage
from headrace_api.faults import FaultClass, Outcome, most_telling
from headrace_operator.brain.observed import Attempt, AttemptState

_GRACE_SECONDS = 100
_KILL_AFTER_SECONDS = _GRACE_SECONDS + 20


@dataclass(kw_only=True)
class LocalAttempts:
    """The attempts of one run."""

    folder: Path
    _children: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    """Agents that this process started; they must be waited for, or they stay as zombies."""

    def observe(self) -> tuple[Attempt, ...]:
        """Every attempt as it is now."""
        for child in self._children.values():
            child.poll()
        return tuple(self._observe(f) for f in sorted(self.folder.glob("*/")) if (f / "processes.json").exists())

    def start(self, resolved: ResolvedStage) -> None:
        """Start the agents of an attempt; one that exists is left alone."""
        folder = self._folder(resolved.stage.name, resolved.attempt)
        if (folder / "processes.json").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        resolved = resolved.model_copy(update={"progress_url": f"file://{folder / 'progress.json'}"})
        (folder / STAGE_FILE).write_text(resolved.model_dump_json(by_alias=True, exclude_none=True, indent=1))
        port = _free_port()
        agents = [self._spawn(folder, index, port) for index in range(resolved.stage.compute.nodes)]
        (folder / "processes.json").write_text(json.dumps(agents))

    def stop(self, stage: str, number: int) -> None:
        """Ask an attempt's agents to save and exit; remove the folder of one that has ended, but for the newest's log."""
        folder = self._folder(stage, number)
        live = [p for p in _processes(folder) if p is not None]
        if not live:
            if self._folder(stage, number + 1).exists():
                shutil.rmtree(folder, ignore_errors=True)
            return
        note = folder / "stop-requested"
        if not note.exists():
            note.touch()
            _signal(live, signal.SIGTERM)
        elif time.time() - note.stat().st_mtime > _KILL_AFTER_SECONDS:
            _signal(live, signal.SIGKILL)

    def _observe(self, folder: Path) -> Attempt:
        resolved = ResolvedStage.model_validate_json((folder / STAGE_FILE).read_text())
        live = _processes(folder)
        outcomes = [None if process is not None else _outcome(folder, i) for i, process in enumerate(live)]
        ended = [o for o in outcomes if o is not None]
        if any(live) and most_telling(ended) is not None:
            self.stop(resolved.stage.name, resolved.attempt)  # a gang is whole, or it is not
        return Attempt(
            stage=resolved.stage.name,
            number=resolved.attempt,
            hash=resolved.hash,
            state=_state(folder, any_live=any(p is not None for p in live), ended=ended),
            outcome=None if any(live) else most_telling(ended) or ended[0],
            progress=_progress(folder),
        )

    def _spawn(self, folder: Path, index: int, port: int) -> dict[str, float]:
        env = dict(os.environ) | {
            "JOB_COMPLETION_INDEX": str(index),
            "HEADRACE_SCRATCH": str(folder / f"scratch-{index}"),
            "HEADRACE_TERMINATION_FILE": str(folder / f"outcome-{index}.json"),
            "HEADRACE_MASTER_ADDR": "127.0.0.1",
            "HEADRACE_MASTER_PORT": str(port),
            "HEADRACE_GRACE_SECONDS": str(_GRACE_SECONDS),
        }
        command = [sys.executable, "-m", "headrace_trainer.agent", str(folder / STAGE_FILE)]
        with (folder / f"agent-{index}.log").open("ab") as log:
            # A session of its own: Ctrl-C reaches only the command line, which stops agents in its own way.
            agent = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._children[agent.pid] = agent
        return {"pid": agent.pid, "created": psutil.Process(agent.pid).create_time()}

    def _folder(self, stage: str, number: int) -> Path:
        return self.folder / f"{stage}-{number}"


def _state(folder: Path, *, any_live: bool, ended: Sequence[Outcome]) -> AttemptState:
    if any_live:
        stopping = (folder / "stop-requested").exists()
        return AttemptState.STOPPING if stopping else AttemptState.RUNNING
    return AttemptState.SUCCEEDED if most_telling(ended) is None else AttemptState.FAILED


def _processes(folder: Path) -> list[psutil.Process | None]:
    """The agents of an attempt, by index; None for one that has ended. A process id that was given away does not count."""
    try:
        agents = json.loads((folder / "processes.json").read_text())
    except FileNotFoundError:
        return []
    return [_alive(int(agent["pid"]), agent["created"]) for agent in agents]


def _alive(pid: int, created: float) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - created) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _outcome(folder: Path, index: int) -> Outcome:
    try:
        return Outcome.model_validate_json((folder / f"outcome-{index}.json").read_text())
    except (FileNotFoundError, ValidationError):
        message = f"the agent ended without a word; see {folder / f'agent-{index}.log'}"
        return Outcome(fault=FaultClass.POD, reason="AgentVanished", message=message)


def _progress(folder: Path) -> Progress | None:
    try:
        return Progress.model_validate_json((folder / "progress.json").read_text())
    except (FileNotFoundError, ValidationError):
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
