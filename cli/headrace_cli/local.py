"""The local body: the planner's plans carried out with processes and a directory.

``run_locally`` observes, plans, writes the status, starts and stops, until the run is complete, failed or suspended.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace_api.run import ConditionType, RunStatus, StageState, TrainingRun
from headrace_cli.attempts import LocalAttempts
from headrace_cli.home import RunFolder, forget_missing_artifacts
from headrace_operator.brain.observed import Observed
from headrace_operator.brain.plan import Event, Plan, plan

_TICK_SECONDS = 0.2

Watcher = Callable[[TrainingRun, tuple[Event, ...]], None]
"""Told of every new status, and of the events that led to it."""


def localize(run: TrainingRun, *, manifest: Path, folder: RunFolder) -> TrainingRun:
    """The run with relative paths made absolute, beside its manifest, and with a default storage."""
    base = manifest.absolute().parent
    value = run.dump()
    for stage in value["spec"]["stages"]:
        for source in _sources(stage):
            source["uri"] = _absolute(source["uri"], base)
    storage = value["spec"].setdefault("storage", {})
    storage["uri"] = _absolute(storage["uri"], base) if "uri" in storage else str(folder.artifacts)
    value["metadata"]["uid"] = folder.uid()
    return TrainingRun.model_validate(value).model_copy(update={"status": folder.status()})


def _sources(stage: dict[str, Any]) -> list[dict[str, Any]]:
    """The blocks of a stage that name files of the user's."""
    imported = stage.get("tokenizer", {}).get("import")
    return [*stage.get("corpus", {}).get("sources", []), *([imported] if imported else [])]


def _absolute(uri: str, base: Path) -> str:
    return uri if "://" in uri else str((base / Path(uri).expanduser()).resolve())


@dataclass(kw_only=True)
class LocalBody:
    """One run on this machine."""

    run: TrainingRun
    folder: RunFolder
    watch: Watcher
    attempts: LocalAttempts = field(init=False)

    def __post_init__(self) -> None:
        self.attempts = LocalAttempts(folder=self.folder.attempts)

    def go(self, *, suspend: threading.Event) -> RunStatus:
        """Work until the run is complete, failed or suspended.

        Args:
            suspend: set it to stop after a checkpoint.
        """
        self.run = self._with_fresh_budgets(forget_missing_artifacts(self.run))
        while True:
            if suspend.is_set() and not self.run.spec.suspend:
                spec = self.run.spec.model_copy(update={"suspend": True})
                self.run = self.run.model_copy(update={"spec": spec})
            decided = self.step()
            if _at_rest(self.run.status) and not decided.start_is_new:
                return self.run.status
            time.sleep(_TICK_SECONDS)

    def step(self) -> "Step":
        """Observe, plan, carry out."""
        observed = Observed(now=datetime.now(UTC), attempts=self.attempts.observe())
        decided = plan(self.run, observed)
        self._keep(decided)
        known = {(a.stage, a.number) for a in observed.attempts}
        for key in decided.stop:
            self.attempts.stop(key.stage, key.number)
        for resolved in decided.start:
            self.attempts.start(resolved)
        return Step(start_is_new=any((r.stage.name, r.attempt) not in known for r in decided.start))

    def _keep(self, decided: Plan) -> None:
        if decided.status != self.run.status:
            self.run = self.run.model_copy(update={"status": decided.status})
            self.folder.save_status(decided.status)
        self.watch(self.run, decided.events)

    def _with_fresh_budgets(self, run: TrainingRun) -> TrainingRun:
        """Running a failed run again means: try again. Suspending is what gives a failed stage its budgets back."""
        if not any(s.state is StageState.FAILED for s in run.status.stages):
            return run
        spec = run.spec.model_copy(update={"suspend": True})
        observed = Observed(now=datetime.now(UTC), attempts=self.attempts.observe())
        status = plan(run.model_copy(update={"spec": spec}), observed).status
        return run.model_copy(update={"status": status})


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step of the body did."""

    start_is_new: bool


def _at_rest(status: RunStatus) -> bool:
    return any(status.condition(kind) for kind in ConditionType)


@contextmanager
def interrupt_suspends() -> Iterator[threading.Event]:
    """While the block runs, Ctrl-C and SIGTERM set the event; a second Ctrl-C is an ordinary one."""
    asked = threading.Event()

    def ask(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_all(folder: RunFolder, *, timeout: float) -> int:
    """Stop whatever of a run still lives, servers included.

    Returns:
        The number of attempts that were stopped.
    """
    attempts, stopped = LocalAttempts(folder=folder.attempts), set()
    deadline = time.monotonic() + timeout
    while live := [a for a in attempts.observe() if a.outcome is None]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder.path.name}: {len(live)} attempts did not stop in {timeout:.0f} s")
        for attempt in live:
            stopped.add((attempt.stage, attempt.number))
            attempts.stop(attempt.stage, attempt.number)
        time.sleep(_TICK_SECONDS)
    return len(stopped)
