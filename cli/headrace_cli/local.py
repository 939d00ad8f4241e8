"""The local body: carries out plans with processes and a directory.

``LocalBody.go`` observes, plans, writes the status, and starts and stops attempts until the run is complete, failed or
suspended. ``prepare`` defines what rerunning a run means; ``headrace plan`` uses it too.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import reduce
from operator import getitem
from pathlib import Path

from pydantic import ValidationError

from headrace_api.artifact import ARTIFACT_FILE, Artifact
from headrace_api.errors import parse_run
from headrace_api.run import ConditionType, RunStatus, StageState, StageStatus, TrainingRun
from headrace_cli.attempts import LocalAttempts
from headrace_cli.home import Gone, Lock, RunFolder
from headrace_operator.brain.observed import LIVE, Observed
from headrace_operator.brain.plan import AttemptKey, Event, Plan, plan

_TICK_SECONDS = 0.2

_SUSPENDING = Event(type="Normal", reason="Suspending", message="after a checkpoint; Ctrl-C again stops at once")

Watcher = Callable[[TrainingRun, tuple[Event, ...]], None]
"""Called with every new status and the events that led to it."""


def localize(run: TrainingRun, *, manifest: Path, folder: RunFolder) -> TrainingRun:
    """The run with paths made absolute (relative to its manifest), a default storage, and its last status.

    Raises:
        ManifestError: an absolute path is too long.
    """
    base = manifest.absolute().parent
    value = run.dump()
    for stage, block in zip(run.spec.stages, value["spec"]["stages"], strict=True):
        for (*path, last), uri in stage.config.addresses():
            reduce(getitem, path, block[stage.kind])[last] = _absolute(uri, base)
    storage = value["spec"].setdefault("storage", {})
    storage["uri"] = _absolute(storage["uri"], base) if "uri" in storage else str(folder.artifacts)
    value["metadata"]["uid"] = folder.uid()
    return parse_run(value).model_copy(update={"status": folder.status_if_whole()})


def _absolute(uri: str, base: Path) -> str:
    return uri if "://" in uri else str((base / Path(uri).expanduser()).resolve())


def prepare(run: TrainingRun, observed: Observed) -> TrainingRun:
    """The run as ``headrace run`` picks it up. Removed artifacts are rebuilt; a failed run gets its budgets back, since
    running it again means retrying it."""
    stages = [s if _is_there(s) else StageStatus(name=s.name, attempt=s.attempt) for s in run.status.stages]
    run = _with_status(run, run.status.model_copy(update={"stages": stages}))
    if not any(s.state is StageState.FAILED for s in stages):
        return run
    # Suspending resets a failed stage's budgets.
    return _with_status(run, plan(_suspended(run), observed).status)


def _is_there(status: StageStatus) -> bool:
    """Whether an artifact is still in storage. Only directories are checked; readers verify what is in S3."""
    if status.state is not StageState.SUCCEEDED or status.artifact is None or "://" in status.artifact.uri:
        return True
    try:
        text = (Path(status.artifact.uri) / ARTIFACT_FILE).read_text()
        return Artifact.model_validate_json(text).digest == status.artifact.digest
    except (OSError, ValidationError, UnicodeDecodeError):
        return False


@dataclass
class Interrupts:
    """What the user has asked of a running run."""

    suspend: bool = False
    """Stop after a checkpoint."""
    at_once: bool = False
    """Stop without one."""


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Within the block, Ctrl-C, SIGTERM and a closed terminal suspend the run; a second Ctrl-C stops it at once."""
    asked, presses = Interrupts(), 0
    terminals = [stream for stream in range(3) if os.isatty(stream)]

    def ask(number: int, _: object) -> None:
        nonlocal presses
        presses += number == signal.SIGINT
        if presses > 2:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            _leave(terminals)
        asked.suspend, asked.at_once = True, presses == 2

    watched = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if not _nohup(s)]
    before = {s: signal.signal(s, ask) for s in watched}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _nohup(number: signal.Signals) -> bool:
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _leave(terminals: list[int]) -> None:
    """Redirect a closed terminal to /dev/null, so that writing to it does not fail the run."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in terminals:
        os.dup2(nowhere, stream)


@dataclass(kw_only=True)
class LocalBody:
    """One run on this machine."""

    run: TrainingRun
    folder: RunFolder
    lock: Lock
    watch: Watcher
    attempts: LocalAttempts = field(init=False)

    def __post_init__(self) -> None:
        self.attempts = LocalAttempts(folder=self.folder.attempts, cache=self.folder.cache)

    def go(self, asked: Interrupts) -> RunStatus:
        """Work until the run is complete, failed or suspended. However it ends, no process is left behind.

        Raises:
            Gone: the run's folder was removed.
            OSError: the status or an attempt's record cannot be written.
        """
        try:
            return self._work(asked)
        except BaseException as error:
            hopeless = isinstance(error, Gone | KeyboardInterrupt)
            self.attempts.end_all(at_once=lambda: hopeless or asked.at_once)
            raise

    def _work(self, asked: Interrupts) -> RunStatus:
        self.run = prepare(self.run, self._observe())
        while True:
            if asked.at_once:
                self.attempts.end_all(at_once=lambda: True)
            if asked.suspend and not self.run.spec.suspend:
                self.run = _suspended(self.run)
                self.watch(self.run, (_SUSPENDING,))
            if self._step():
                return self.run.status
            time.sleep(_TICK_SECONDS)

    def _step(self) -> bool:
        """Observe, plan and act once.

        Returns:
            Whether the run is at rest: nothing was started, and nothing is still to be stopped or started.
        """
        self.lock.check()
        observed = self._observe()
        decided = plan(self.run, observed)
        self._keep(decided)
        self.attempts.enforce(observed.attempts)
        for key in decided.stop:
            self.attempts.stop(key.stage, key.number)
        for resolved in decided.start:
            self.attempts.start(resolved)
        known = {AttemptKey(stage=a.stage, number=a.number): a.state in LIVE for a in observed.attempts}
        started = any(AttemptKey(stage=r.stage.name, number=r.attempt) not in known for r in decided.start)
        stopping = any(known.get(key, False) for key in decided.stop)
        return not started and not stopping and any(self.run.status.condition(kind) for kind in ConditionType)

    def _observe(self) -> Observed:
        return Observed(now=datetime.now(UTC), attempts=self.attempts.observe())

    def _keep(self, decided: Plan) -> None:
        before = self.run.status
        if decided.status != before:
            self.run = _with_status(self.run, decided.status)
            # Progress is not worth an fsync.
            durable = (before.stages, before.conditions) != (decided.status.stages, decided.status.conditions)
            self.folder.save_status(decided.status, durable=durable)
        self.watch(self.run, decided.events)


def _suspended(run: TrainingRun) -> TrainingRun:
    return run.model_copy(update={"spec": run.spec.model_copy(update={"suspend": True})})


def _with_status(run: TrainingRun, status: RunStatus) -> TrainingRun:
    return run.model_copy(update={"status": status})
