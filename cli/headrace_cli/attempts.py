"""Attempts as local processes: one agent for each pod that a cluster would run.

In: a ``ResolvedStage``. Out: ``Attempt`` values for the planner. An attempt is a folder with ``stage.json``,
``processes.json``, and a log and an outcome per agent, so a new ``headrace`` process sees what an earlier one started.
If a record is lost, the processes themselves are searched for (``processes.py``).
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
from pydantic import BaseModel

from headrace_api.contract import STAGE_FILE, Progress, ResolvedStage
from headrace_api.faults import FaultClass, Outcome
from headrace_cli import records
from headrace_cli.problem import Problem
from headrace_cli.processes import SCRATCH, agent, find_agents, kill_all
from headrace_operator.brain.endings import End, explain_failure, explain_success
from headrace_operator.brain.observed import LIVE, Attempt, AttemptState

PROCESSES_FILE = "processes.json"
_STOP_NOTE = "stop-requested"
_GRACE = "HEADRACE_GRACE_SECONDS"
_MARGIN_SECONDS = 5.0
"""Time for an agent to write its outcome after killing its ranks."""
_POLL_SECONDS = 0.1
_NO_SPACE_BYTES = 64 << 10
_FOLDER = re.compile(r"^(?P<stage>.+)-(?P<number>[1-9][0-9]*)$")


def _grace_seconds() -> float:
    text = os.environ.get(_GRACE, "100")
    try:
        return float(text)
    except ValueError as error:
        raise Problem(f"{_GRACE}: {text!r}: not a number of seconds; write one, as 100, or unset it") from error


class Started(BaseModel):
    """``processes.json``: what was started. Enough to manage an attempt whose ``stage.json`` is lost."""

    pids: dict[int, int]
    """Pod index -> the agent's process id."""
    hash: str
    digest: str


@dataclass(kw_only=True)
class LocalAttempts:
    """The attempts of one run."""

    folder: Path
    cache: Path | None = None
    """Where stages cache their inputs on this machine, across attempts and runs."""
    grace_seconds: float = field(default_factory=_grace_seconds)
    """How long an agent may take to save and exit before it is killed."""
    _children: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    """Agents that this process started, to be reaped so that they do not stay zombies."""
    _known: dict[Path, tuple[int | None, dict[int, int]]] = field(default_factory=dict)
    """Attempt -> (mtime of its record, pod index -> process id), as recorded or else as found."""
    _asked: dict[Path, float] = field(default_factory=dict)
    """When an attempt was asked to stop, if that could not be written to disk."""

    def observe(self) -> tuple[Attempt, ...]:
        """Every attempt as it is now. Changes nothing."""
        for child in self._children.values():
            child.poll()
        found = []
        for folder in sorted(self.folder.glob("*/")):
            with contextlib.suppress(FileNotFoundError):  # removed concurrently
                found += self._observe(folder)
        return tuple(found)

    def resolved(self, attempt: Attempt) -> ResolvedStage | None:
        """The stage an attempt was started for; None if its record is lost."""
        return records.read_if_whole(self._folder(attempt.stage, attempt.number) / STAGE_FILE, ResolvedStage)

    def start(self, resolved: ResolvedStage) -> None:
        """Start an attempt's agents, unless it exists.

        Raises:
            OSError: a record cannot be written or a process cannot be started; the attempt's processes are killed.
        """
        folder = self._folder(resolved.stage.name, resolved.attempt)
        if (folder / PROCESSES_FILE).exists() or self._live(folder):
            return
        shutil.rmtree(folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        folder.mkdir()
        resolved = resolved.model_copy(update={"progress_url": f"file://{folder / 'progress.json'}"})
        try:
            text = resolved.model_dump_json(by_alias=True, exclude_none=True, indent=1)
            records.write(folder / STAGE_FILE, text, durable=False)
            port = _free_port()
            pids = {index: self._spawn(folder, index, port) for index in range(resolved.stage.compute.nodes)}
            started = Started(pids=pids, hash=resolved.hash, digest=resolved.digest)
            records.write(folder / PROCESSES_FILE, started.model_dump_json(), durable=False)
        except BaseException:
            kill_all(folder)
            raise

    def stop(self, stage: str, number: int) -> None:
        """Ask an attempt's agents to save and exit; kill them after the grace period.

        Removes the folder of an attempt that has ended, except the newest, whose log is kept.
        """
        folder = self._folder(stage, number)
        live = self._live(folder)
        if not live:
            if self._folder(stage, number + 1).exists():
                shutil.rmtree(folder, ignore_errors=True)
            return
        asked_at = self._asked_at(folder)
        if asked_at is None:
            self._note_request(folder)
            _signal(live.values(), signal.SIGTERM)
        elif time.time() - asked_at > self.grace_seconds + _MARGIN_SECONDS:
            kill_all(folder)

    def enforce(self, attempts: Iterable[Attempt]) -> None:
        """Stop the rest of a gang that lost an agent, and follow up on stop requests."""
        for attempt in (a for a in attempts if a.state in LIVE):
            folder = self._folder(attempt.stage, attempt.number)
            ends = self._ends(folder, live=self._live(folder))
            if attempt.state is AttemptState.STOPPING or explain_failure(ends) is not None:
                self.stop(attempt.stage, attempt.number)

    def end_all(self, *, at_once: Callable[[], bool]) -> None:
        """Stop every attempt and wait until no process of this folder is left.

        Args:
            at_once: polled; once true, attempts are killed without saving.

        Raises:
            Problem: a process cannot be killed.
        """
        while not at_once() and (live := [a for a in self.observe() if a.state in LIVE]):
            for attempt in live:
                self.stop(attempt.stage, attempt.number)
            time.sleep(_POLL_SECONDS)
        kill_all(self.folder)

    def stages(self) -> set[str]:
        """The stages that have an attempt."""
        return {name["stage"] for f in self.folder.glob("*/") if (name := _FOLDER.match(f.name)) is not None}

    def log_files(self, stage: str) -> list[Path]:
        """The logs of a stage's newest attempt, by pod index."""
        numbers = [n for f in self.folder.glob(f"{stage}-*/") if (n := _number(f, stage)) is not None]
        if not numbers:
            return []
        logs = self._folder(stage, max(numbers)).glob("agent-*.log")
        return sorted(logs, key=lambda path: int(path.stem.rpartition("-")[2]))

    def _observe(self, folder: Path) -> list[Attempt]:
        """The attempt in a folder; none if its creator died before it started an agent."""
        name, live = _FOLDER.match(folder.name), self._live(folder)
        if name is None or (not live and not (folder / PROCESSES_FILE).exists()):
            return []
        known = records.read_if_whole(folder / STAGE_FILE, ResolvedStage) or _recorded(folder)
        ends = self._ends(folder, live=live)
        failed = explain_failure(ends)
        if live:
            state = AttemptState.STOPPING if self._asked_at(folder) is not None else AttemptState.RUNNING
        else:
            state = AttemptState.FAILED if failed is not None else AttemptState.SUCCEEDED
        attempt = Attempt(
            stage=name["stage"],
            number=int(name["number"]),
            hash=known.hash if known is not None else "",
            digest=known.digest if known is not None else "",
            state=state,
            outcome=None if live else failed or explain_success(ends),
            progress=records.read_if_whole(folder / "progress.json", Progress),
            ended_at=None if live else _ended_at(folder),
        )
        return [attempt]

    def _agents(self, folder: Path) -> Mapping[int, int]:
        """Pod index -> process id: as recorded, else as found."""
        record = folder / PROCESSES_FILE
        stamp = record.stat().st_mtime_ns if record.exists() else None
        if folder not in self._known or self._known[folder][0] != stamp:
            started = _recorded(folder)
            self._known[folder] = (stamp, started.pids if started is not None else _found(folder))
        return self._known[folder][1]

    def _live(self, folder: Path) -> dict[int, psutil.Process]:
        found = {index: agent(pid, folder) for index, pid in self._agents(folder).items()}
        return {index: process for index, process in found.items() if process is not None}

    def _ends(self, folder: Path, *, live: Collection[int]) -> list[End]:
        """How the agents ended, for those that have."""
        resolved = records.read_if_whole(folder / STAGE_FILE, ResolvedStage)
        indices = range(resolved.stage.compute.nodes) if resolved is not None else sorted(self._agents(folder)) or [0]
        return [_end(folder, index) for index in indices if index not in live]

    def _asked_at(self, folder: Path) -> float | None:
        try:
            return (folder / _STOP_NOTE).stat().st_mtime
        except FileNotFoundError:
            return self._asked.get(folder)

    def _note_request(self, folder: Path) -> None:
        try:
            (folder / _STOP_NOTE).touch()
        except OSError:
            self._asked[folder] = time.time()

    def _spawn(self, folder: Path, index: int, port: int) -> int:
        env = dict(os.environ) | {
            "JOB_COMPLETION_INDEX": str(index),
            SCRATCH: str(folder / f"scratch-{index}"),
            "HEADRACE_CACHE": str(self.cache or ""),
            "HEADRACE_TERMINATION_FILE": str(folder / f"outcome-{index}.json"),
            "HEADRACE_MASTER_ADDR": "127.0.0.1",
            "HEADRACE_MASTER_PORT": str(port),
            _GRACE: str(self.grace_seconds),
        }
        command = [sys.executable, "-m", "headrace_trainer.agent", str(folder / STAGE_FILE)]
        with (folder / f"agent-{index}.log").open("ab") as log:
            # Its own session, so that Ctrl-C reaches only the command line, which stops agents its own way.
            child = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._children[child.pid] = child
        return child.pid

    def _folder(self, stage: str, number: int) -> Path:
        return self.folder / f"{stage}-{number}"


def _recorded(folder: Path) -> Started | None:
    return records.read_if_whole(folder / PROCESSES_FILE, Started)


def _found(folder: Path) -> dict[int, int]:
    return {index: process.pid for index, process in find_agents(folder).items()}


def _number(folder: Path, stage: str) -> int | None:
    name = _FOLDER.match(folder.name)
    return int(name["number"]) if name is not None and name["stage"] == stage else None


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _outcome(folder: Path, index: int) -> Outcome:
    said = records.read_if_whole(folder / f"outcome-{index}.json", Outcome)
    if said is not None:
        return said
    if shutil.disk_usage(folder).free < _NO_SPACE_BYTES:
        message = f"{folder}: no space left on the device: free some"
        return Outcome(fault=FaultClass.STORAGE, reason="NoSpace", message=message)
    message = f"the agent left no outcome; see {folder / f'agent-{index}.log'}"
    return Outcome(fault=FaultClass.POD, reason="AgentVanished", message=message)


def _end(folder: Path, index: int) -> End:
    """How an agent ended. One without an outcome was killed from outside, and its peers failed for lack of it."""
    outcome, file = _outcome(folder, index), folder / f"outcome-{index}.json"
    at = datetime.fromtimestamp(file.stat().st_mtime, UTC) if file.exists() else None
    return End(outcome=outcome, index=index, at=at, taken=outcome.fault is FaultClass.POD)


def _ended_at(folder: Path) -> datetime:
    """When a dead attempt last wrote anything."""
    signs = [*folder.glob("outcome-*.json"), *folder.glob("agent-*.log"), *folder.glob("*.json")]
    return datetime.fromtimestamp(max(f.stat().st_mtime for f in signs), UTC)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
