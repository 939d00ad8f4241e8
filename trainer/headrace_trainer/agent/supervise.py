"""The agent: skip finished work, start the ranks, report, stop them on request or on a hang, write an ``Outcome``.

In: ``stage.json`` and the environment (``settings.py``). Out: progress by HTTP or to a file, Prometheus metrics, a
termination message and an exit code. ``launch`` runs the processes, ``watch`` decides which ranks are late, ``stall``
inspects those, and ``outcomes`` picks the outcome that explains the end.
"""

import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from headrace_api.base import parse_duration
from headrace_api.contract import Progress, ResolvedStage
from headrace_api.faults import FaultClass, Outcome
from headrace_api.stages import RunsAs
from headrace_trainer import artifacts
from headrace_trainer.agent.launch import Ended, Launch
from headrace_trainer.agent.memory import oom_kills
from headrace_trainer.agent.metrics import AgentMetrics
from headrace_trainer.agent.outcomes import exit_code_of, explain
from headrace_trainer.agent.reporter import Reporter
from headrace_trainer.agent.settings import Settings
from headrace_trainer.agent.stall import Stalls
from headrace_trainer.agent.watch import ANSWER_SECONDS, LAUNCHER, RUNNING, Beat, Watch
from headrace_trainer.processes import is_stopped
from headrace_trainer.stage import EVIDENCE, STOP_FILE, outcome_of
from headrace_trainer.storage import open_store

_POLL_SECONDS = 0.2
_MESSAGE_CHARACTERS = 800
"""At up to four bytes each; the rest of an outcome is small."""
_LAST_WORDS_SECONDS = 5.0
"""How long the other ranks get to leave outcomes after one has failed: the real cause may arrive second."""

log = logging.getLogger("headrace.agent")


def main(argv: list[str]) -> int:
    """Supervise one pod's part of an attempt. Returns an ``ExitCode``."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    settings = Settings.from_environment(os.environ)
    resolved = ResolvedStage.model_validate_json(Path(argv[0]).read_text())
    reporter = Reporter(resolved, settings)
    try:
        shutil.rmtree(settings.scratch, ignore_errors=True)
        (settings.scratch / EVIDENCE).mkdir(parents=True)
        # The launcher imports while we ask storage whether the ranks are needed at all.
        with Launch(Path(argv[0]), resolved, settings) as launch:
            outcome = done_already(resolved) or Agent(resolved, settings, reporter, launch).run()
    except Exception as error:
        outcome, _ = outcome_of(error, rank=0)
    outcome = outcome.model_copy(update={"node": settings.node})
    write_termination_message(settings.termination_file, outcome)
    reporter.finish(outcome)
    log.info("%s: %s %s", resolved.stage.name, outcome.reason, outcome.message)
    _clean(settings.scratch)
    return exit_code_of(outcome)


def write_termination_message(path: Path, outcome: Outcome) -> None:
    """Write the outcome where the kubelet reads it: at most 4096 bytes.

    Written in place: in a pod the file is a mount and cannot be replaced. If the disk is full, the exit code still
    tells the class of the fault.
    """
    shortened = outcome.model_copy(update={"message": outcome.message[:_MESSAGE_CHARACTERS]})
    try:
        path.write_text(shortened.model_dump_json(by_alias=True, exclude_none=True))
    except OSError as error:
        log.error("failed to write the outcome: %s", error)


def done_already(resolved: ResolvedStage) -> Outcome | None:
    """The outcome of an earlier attempt or run that produced exactly this stage's artifact."""
    artifact = artifacts.find(open_store(resolved.storage), resolved)
    if artifact is None:
        return None
    return Outcome(
        reason="AlreadyDone",
        message=f"made at {artifact.created_at:%Y-%m-%d %H:%M} and unchanged",
        artifact_digest=artifact.digest,
        metrics=artifact.metrics,
    )


def _clean(scratch: Path) -> None:
    """Remove an attempt's files from this node, except evidence of a hang."""
    if not scratch.is_dir():
        return
    for path in scratch.iterdir():
        if path.name == EVIDENCE and any(path.iterdir()):
            continue
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    if not any(scratch.iterdir()):
        scratch.rmdir()


class Agent:
    """Supervises one set of ranks."""

    def __init__(self, resolved: ResolvedStage, settings: Settings, reporter: Reporter, launch: Launch) -> None:
        self.resolved, self.settings, self.reporter, self.launch = resolved, settings, reporter, launch
        self._metrics = AgentMetrics(resolved, settings)
        self._watch = Watch(on_stall=parse_duration(resolved.on_stall) if resolved.on_stall is not None else None)
        self._stalls = Stalls(resolved, settings, launch, self._watch)
        self._reports: dict[int, tuple[int, Progress]] = {}
        self._looks = 0
        self._asked_to_stop_at: float | None = None
        self._failed_at: float | None = None
        self._oom_kills = oom_kills()

    def run(self) -> Outcome:
        """Start the ranks and supervise them until they end."""
        signal.signal(signal.SIGTERM, lambda *_: self._ask_to_stop())
        signal.signal(signal.SIGINT, lambda *_: self._ask_to_stop())
        self.launch.start_ranks()
        verdict = None
        while not self.launch.poll():
            self._look()
            verdict = self._must_be_stopped() or self._stalls.verdict()
            if verdict is not None or self._others_had_their_say():
                break
            time.sleep(_POLL_SECONDS)
        self._look()
        ended = tuple(self.launch.ended)  # excludes the ranks killed below: they explain nothing
        self.launch.kill()
        return self._explain(ended, verdict)

    def _ask_to_stop(self) -> None:
        """Leave a note that every rank of this pod reads at its next step. Idempotent."""
        if self._asked_to_stop_at is None:
            self._asked_to_stop_at = time.monotonic()
            try:
                (self.settings.scratch / STOP_FILE).touch()
            except OSError as error:
                log.error("failed to ask the ranks to stop: %s", error)

    def _look(self) -> None:
        """Read the ranks' heartbeats and reports, and forward those of the first rank."""
        self._watch.tick(time.monotonic())
        self._look_at_launcher()
        for rank, slot in self.launch.slots.items():
            beats, reports = slot.counts
            if reports != self._reports_of(rank) and (text := slot.progress) is not None:
                self._reports[rank] = (reports, Progress.model_validate_json(text))
            if rank not in self.launch.pids:
                self._watch.forget(rank)
                continue
            said = self._reports.get(rank)
            where = {} if said is None else {"phase": said[1].phase, "done": said[1].done, "unit": said[1].unit}
            self._watch.see(rank, Beat(beats=beats, reports=reports, **where))
        said = self._reports.get(self.launch.plan.first)
        if said is not None:
            self._metrics.update(said[1])
            self.reporter.send(said[1])

    def _reports_of(self, rank: int) -> int:
        return self._reports[rank][0] if rank in self._reports else 0

    def _look_at_launcher(self) -> None:
        """The launcher is late if it imports for too long, or if it is stopped once the ranks have started."""
        started = bool(self.launch.pids or self.launch.ended)
        if started and not is_stopped(self.launch.launcher):
            self._looks += 1
        phase = RUNNING if started else "Starting"
        self._watch.see(LAUNCHER, Beat(beats=self._looks, reports=self._looks, phase=phase))

    def _must_be_stopped(self) -> Outcome | None:
        """Why to stop waiting for ranks that were asked to stop; None while waiting is right."""
        if self._asked_to_stop_at is None or (self.launch.ended and not self.launch.pids):
            return None
        since = time.monotonic() - self._asked_to_stop_at
        is_gang = self.resolved.stage.config.RUNS_AS is RunsAs.GANG
        if is_gang and self._watch.has_nothing_to_save():
            return Outcome(fault=FaultClass.STOPPED, reason="Stopped", message="stopped before the first step")
        held = [r for r, pid in self.launch.pids.items() if is_stopped(pid)] if since > ANSWER_SECONDS else []
        silent = sorted({*held, *self._watch.unanswered(seconds_since_stop=since)})
        if not silent and since <= self.settings.grace_seconds:
            return None
        if not is_gang:
            message = f"killed {since:.0f} s after the stop request; there was nothing to save"
            return Outcome(fault=FaultClass.STOPPED, reason="Stopped", message=message)
        who = f"ranks {', '.join(map(str, silent))}" if silent else "some ranks"
        message = (
            f"{who} did not answer the stop request; all were killed after {since:.0f} s, and the work since the last "
            "checkpoint is lost"
        )
        return Outcome(fault=FaultClass.PROCESS, reason="KilledWhileStopping", message=message)

    def _others_had_their_say(self) -> bool:
        """Whether the other ranks have had their time to leave outcomes since one failed."""
        if self._failed_at is None and any(e.code != 0 for e in self.launch.ended):
            self._failed_at = time.monotonic()
        return self._failed_at is not None and time.monotonic() - self._failed_at > _LAST_WORDS_SECONDS

    def _explain(self, ended: Sequence[Ended], verdict: Outcome | None) -> Outcome:
        if self.launch.error is not None and verdict is None:
            kind, message = self.launch.error
            return Outcome(fault=FaultClass.PROCESS, reason=kind, message=message)
        order = [e.rank for e in ended]
        ranks = sorted(self.launch.slots, key=lambda r: order.index(r) if r in order else len(order))
        words = [Outcome.model_validate_json(text) for r in ranks if (text := self.launch.slots[r].words) is not None]
        now = oom_kills()
        kills = None if now is None or self._oom_kills is None else now - self._oom_kills
        return explain(words, ended, verdict=verdict, oom_kills=kills)
