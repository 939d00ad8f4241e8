"""The agent: skip what is done, start the ranks, report, stop them when asked or when one hangs, leave an ``Outcome``.

In: ``stage.json`` and the environment (``settings.py``). Out: progress by HTTP or to a file, Prometheus metrics, a
termination message and an exit code. ``launch`` is the processes, ``watch`` decides who is late, ``stall`` looks into
it, ``outcomes`` says what explains the end.
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
"""Of four bytes each at the most; the rest of an outcome is small."""
_LAST_WORDS_SECONDS = 5.0
"""For the other ranks to say why, when one has failed: what explains the rest may come second."""

log = logging.getLogger("headrace.agent")


def main(argv: list[str]) -> int:
    """Supervise one pod's part of an attempt; the exit code is one of ``ExitCode``."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    settings = Settings.from_environment(os.environ)
    resolved = ResolvedStage.model_validate_json(Path(argv[0]).read_text())
    reporter = Reporter(resolved, settings)
    try:
        shutil.rmtree(settings.scratch, ignore_errors=True)
        (settings.scratch / EVIDENCE).mkdir(parents=True)
        # The launcher imports what ranks need while storage is asked whether they are needed.
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
    """Leave the outcome where the kubelet reads it, which takes no more than 4096 bytes.

    In place: in a pod the file is a mount of its own, and cannot be replaced. Without room for it, the exit code says
    the class of the fault.
    """
    shortened = outcome.model_copy(update={"message": outcome.message[:_MESSAGE_CHARACTERS]})
    try:
        path.write_text(shortened.model_dump_json(by_alias=True, exclude_none=True))
    except OSError as error:
        log.error("the outcome could not be written: %s", error)


def done_already(resolved: ResolvedStage) -> Outcome | None:
    """The outcome of an earlier attempt, or of an earlier run, that left exactly this stage's artifact."""
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
    """Remove what an attempt left on this node, but for the evidence of a hang."""
    if not scratch.is_dir():
        return
    for path in scratch.iterdir():
        if path.name == EVIDENCE and any(path.iterdir()):
            continue
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    if not any(scratch.iterdir()):
        scratch.rmdir()


class Agent:
    """The supervision of one set of ranks."""

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
        """Let the ranks start, and stay with them until they end."""
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
        ended = tuple(self.launch.ended)  # the ranks that are killed now explain nothing
        self.launch.kill()
        return self._explain(ended, verdict)

    def _ask_to_stop(self) -> None:
        """Leave a note that every rank of this pod reads at its next step. Asking again changes nothing."""
        if self._asked_to_stop_at is None:
            self._asked_to_stop_at = time.monotonic()
            try:
                (self.settings.scratch / STOP_FILE).touch()
            except OSError as error:
                log.error("the ranks could not be asked to stop: %s", error)

    def _look(self) -> None:
        """Take over what the ranks say of themselves, and pass on what the first one says."""
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
        """It is late if it imports for too long; once the ranks have started, if something holds it."""
        started = bool(self.launch.pids or self.launch.ended)
        if started and not is_stopped(self.launch.launcher):
            self._looks += 1
        phase = RUNNING if started else "Starting"
        self._watch.see(LAUNCHER, Beat(beats=self._looks, reports=self._looks, phase=phase))

    def _must_be_stopped(self) -> Outcome | None:
        """Why ranks that were asked to stop are not waited for any longer; None while they are."""
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
            message = f"killed {since:.0f} s after the request to stop; there was nothing to save"
            return Outcome(fault=FaultClass.STOPPED, reason="Stopped", message=message)
        who = f"ranks {', '.join(map(str, silent))}" if silent else "some ranks"
        message = (
            f"{who} did not answer the request to stop; all were killed after {since:.0f} s, and the work since the last "
            "checkpoint is lost"
        )
        return Outcome(fault=FaultClass.PROCESS, reason="KilledWhileStopping", message=message)

    def _others_had_their_say(self) -> bool:
        """Whether a rank failed so long ago that the others need not be heard."""
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
