"""Which of a pod's ranks explains how the attempt ended."""

import json
import signal
from pathlib import Path
from typing import Any

from headrace_api.faults import ExitCode, FaultClass, Outcome, most_telling
from headrace_trainer.stage import OUTCOMES

FIRST_FAILURE_FILE = "first-failure.json"
"""Where ``gang`` notes the rank that torchrun saw fail first."""
_CODES = {
    None: ExitCode.OK,
    FaultClass.USER: ExitCode.USER,
    FaultClass.STORAGE: ExitCode.STORAGE,
    FaultClass.STOPPED: ExitCode.STOPPED,
}


def exit_code_of(outcome: Outcome) -> int:
    """The pod's exit code."""
    return _CODES.get(outcome.fault, ExitCode.PROCESS)


def explain(scratch: Path, *, exit_code: int, stopping: bool) -> Outcome:
    """The outcome of a pod, from what its ranks left.

    Args:
        scratch: where ranks left their outcomes, and torchrun its note of the first failure.
        exit_code: of the process that started the ranks; negative for a signal.
        stopping: whether the pod had been asked to stop.
    """
    records = sorted(_records(scratch / OUTCOMES), key=lambda r: float(r["time"]))
    said = [Outcome.model_validate(r["outcome"]) for r in records]
    if exit_code == 0:
        return next((o for o in said if o.artifact_digest is not None), Outcome())
    told = most_telling(said)
    if told is not None and told.fault is not FaultClass.PROCESS:
        return told
    return _killed(scratch, exit_code) or told or _silent(exit_code, stopping=stopping)


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*.json"))] if folder.is_dir() else []


def _killed(scratch: Path, exit_code: int) -> Outcome | None:
    """A rank that died of a signal, so that it could not speak; its peers' errors follow from that."""
    note = scratch / FIRST_FAILURE_FILE
    first = json.loads(note.read_text()) if note.exists() else {"rank": 0, "exitCode": exit_code}
    if first["exitCode"] >= 0:
        return None
    name = signal.Signals(-first["exitCode"]).name
    message = f"rank {first['rank']} was ended by {name}"
    if name == "SIGKILL":
        message += "; if nobody did that, it may have run out of memory"
    return Outcome(fault=FaultClass.PROCESS, reason="RankKilled", message=message, rank=first["rank"])


def _silent(exit_code: int, *, stopping: bool) -> Outcome:
    if stopping:
        return Outcome(
            fault=FaultClass.PROCESS,
            reason="KilledWhileStopping",
            message="the ranks did not stop within the grace period",
        )
    return Outcome(
        fault=FaultClass.PROCESS, reason="RanksFailed", message=f"exit code {exit_code} without a word; see the log"
    )
