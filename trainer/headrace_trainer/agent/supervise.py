"""The agent: skip what is done, start the ranks, report, stop them when asked, and leave an ``Outcome``.

In: ``stage.json`` and the environment (``settings.py``). Out: progress by HTTP or to a file, Prometheus metrics, a
termination message and an exit code. The ranks are children in a session of their own, so that nothing outlives them.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from headrace_api.contract import ResolvedStage
from headrace_api.faults import Outcome
from headrace_trainer import artifacts
from headrace_trainer.agent.launch import rank_command, rank_environment
from headrace_trainer.agent.metrics import AgentMetrics
from headrace_trainer.agent.outcomes import exit_code_of, explain
from headrace_trainer.agent.reporter import Reporter
from headrace_trainer.agent.settings import Settings
from headrace_trainer.processes import die_with_parent, kill_session
from headrace_trainer.stage import STOP_FILE, outcome_of
from headrace_trainer.storage import open_store

_POLL_SECONDS = 0.2
_MESSAGE_CHARACTERS = 800
"""Of four bytes each at the most; the rest of an outcome is small."""

log = logging.getLogger("headrace.agent")


def main(argv: list[str]) -> int:
    """Supervise one pod's part of an attempt; the exit code is one of ``ExitCode``."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    settings = Settings.from_environment(os.environ)
    resolved = ResolvedStage.model_validate_json(Path(argv[0]).read_text())
    shutil.rmtree(settings.scratch, ignore_errors=True)
    settings.scratch.mkdir(parents=True)
    reporter = Reporter(resolved, settings)
    try:
        outcome = done_already(resolved) or Agent(Path(argv[0]), resolved, settings, reporter).run()
    except Exception as error:
        outcome, _ = outcome_of(error, rank=0)
    outcome = outcome.model_copy(update={"node": settings.node})
    write_termination_message(settings.termination_file, outcome)
    reporter.finish(outcome)
    log.info("%s: %s %s", resolved.stage.name, outcome.reason, outcome.message)
    shutil.rmtree(settings.scratch, ignore_errors=True)
    return exit_code_of(outcome)


def write_termination_message(path: Path, outcome: Outcome) -> None:
    """Leave the outcome where the kubelet reads it, which takes no more than 4096 bytes.

    In place: in a pod the file is a mount of its own, and cannot be replaced.
    """
    shortened = outcome.model_copy(update={"message": outcome.message[:_MESSAGE_CHARACTERS]})
    path.write_text(shortened.model_dump_json(by_alias=True, exclude_none=True))


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


class Agent:
    """The supervision of one set of ranks."""

    def __init__(self, stage_file: Path, resolved: ResolvedStage, settings: Settings, reporter: Reporter) -> None:
        self.resolved, self.settings, self.reporter = resolved, settings, reporter
        self._stage_file = stage_file
        self._stop_deadline: float | None = None
        self._metrics = AgentMetrics(resolved, settings)

    def run(self) -> Outcome:
        """Start the ranks and stay with them until they end."""
        signal.signal(signal.SIGTERM, lambda *_: self._ask_to_stop())
        signal.signal(signal.SIGINT, lambda *_: self._ask_to_stop())
        ranks = subprocess.Popen(
            rank_command(self._stage_file, self.resolved, self.settings),
            env=rank_environment(self.resolved, self.settings),
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            while ranks.poll() is None:
                self._tick(ranks)
                time.sleep(_POLL_SECONDS)
        finally:
            kill_session(ranks.pid)
        return explain(self.settings.scratch, exit_code=ranks.returncode, stopping=self._stop_deadline is not None)

    def _tick(self, ranks: "subprocess.Popen[bytes]") -> None:
        progress = self.reporter.newest()
        if progress is not None:
            self._metrics.update(progress)
            self.reporter.send(progress)
        if self._stop_deadline is not None and time.monotonic() > self._stop_deadline:
            log.error("the ranks did not stop in %.0f s and are killed", self.settings.grace_seconds)
            kill_session(ranks.pid)

    def _ask_to_stop(self) -> None:
        """Leave a note that every rank of this pod reads at its next step."""
        if self._stop_deadline is None:
            self._stop_deadline = time.monotonic() + self.settings.grace_seconds
            (self.settings.scratch / STOP_FILE).touch()
