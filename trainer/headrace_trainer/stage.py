"""One rank of a stage: ``python -m headrace_trainer.stage stage.json``.

In: a ``ResolvedStage`` and the environment that torchrun or the agent sets. ``stages.<kind>.run`` does the work; what
it leaves in ``ctx.output`` is committed as the stage's artifact. Out: an ``Outcome`` for each rank, in the scratch
folder, from which the agent makes the pod's termination message.
"""

import errno
import fcntl
import importlib
import json
import logging
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace_api.contract import Progress, ResolvedStage
from headrace_api.faults import ExitCode, Outcome
from headrace_api.stages import StageConfig
from headrace_trainer import artifacts
from headrace_trainer.errors import StorageError, UserError, fault_of
from headrace_trainer.processes import die_with_parent
from headrace_trainer.storage import ObjectStore, open_store, open_uri

_REPORT_SECONDS = 0.5
STOP_FILE = "stop"
HEARTBEATS = "heartbeats"
OUTCOMES = "outcomes"

log = logging.getLogger("headrace")


@dataclass(kw_only=True)
class StageContext:
    """What a stage is given: its configuration, its inputs, and somewhere to leave its results."""

    resolved: ResolvedStage
    scratch: Path
    """A folder on this node that this attempt has for itself."""
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    index: int = 0
    """The pod's index: ``JOB_COMPLETION_INDEX``."""
    store: ObjectStore = field(init=False)
    _last_report: tuple[float, str] = field(default=(0.0, ""), init=False)

    def __post_init__(self) -> None:
        self.store = open_store(self.resolved.storage)
        self.output.mkdir(parents=True, exist_ok=True)

    @property
    def config(self) -> StageConfig:
        """The stage's typed block."""
        return self.resolved.stage.config

    @property
    def count(self) -> int:
        """The number of pods."""
        return self.resolved.stage.compute.nodes

    @property
    def output(self) -> Path:
        """The folder whose files become the artifact. Pods leave parts of it; paths must differ between pods."""
        return self.scratch / "output"

    def input(self, slot: str) -> Path:
        """A local folder with the verified files of an input; ranks of one node share one copy.

        Raises:
            StorageError: the artifact is gone or corrupt.
        """
        ref = self.resolved.inputs[slot]
        folder, done = self.scratch / "inputs" / slot, self.scratch / "inputs" / f"{slot}.path"
        folder.mkdir(parents=True, exist_ok=True)
        with (self.scratch / "inputs" / f"{slot}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                path = artifacts.fetch(open_uri(ref.uri, self.resolved.storage), ref, into=folder)
                done.write_text(str(path))
        return Path(done.read_text())

    def stop_requested(self) -> bool:
        """Whether this pod was asked to stop; other pods may not know yet, so ranks must agree on it."""
        return (self.scratch / STOP_FILE).exists()

    def report(self, **fields: Any) -> None:
        """Say how far this rank is: any fields of ``Progress``. Cheap: at most two writes a second and phase."""
        phase, now = str(fields.get("phase", "")), time.monotonic()
        if phase == self._last_report[1] and now - self._last_report[0] < _REPORT_SECONDS:
            return
        self._last_report = (now, phase)
        progress = Progress(
            stage=self.resolved.stage.name, attempt=self.resolved.attempt, time=datetime.now(UTC), **fields
        )
        write_atomically(self.scratch / HEARTBEATS / f"{self.rank}.json", progress.model_dump_json(by_alias=True))


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that readers see the old or the new text, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(text)
    staged.replace(path)


def context_from_environment(stage_file: Path) -> StageContext:
    """The context of this rank: ``HEADRACE_SCRATCH``, ``JOB_COMPLETION_INDEX`` and torchrun's variables."""
    env = os.environ
    return StageContext(
        resolved=ResolvedStage.model_validate_json(stage_file.read_text()),
        scratch=Path(env["HEADRACE_SCRATCH"]),
        rank=int(env.get("RANK", env.get("JOB_COMPLETION_INDEX", "0"))),
        world=int(env.get("WORLD_SIZE", "1")),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        index=int(env.get("JOB_COMPLETION_INDEX", "0")),
    )


def run_stage(ctx: StageContext) -> Outcome:
    """Do the stage's work and commit its artifact.

    Returns:
        The outcome of this rank; the one of rank 0 has the artifact's digest.
    """
    started = time.time()
    metrics = importlib.import_module(f"headrace_trainer.stages.{ctx.resolved.stage.kind}").run(ctx)
    if ctx.local_rank != 0:
        return Outcome()
    ctx.report(phase="Saving")
    artifacts.upload_part(ctx.store, ctx.resolved, ctx.output, index=ctx.index)
    if ctx.index != 0:
        return Outcome()
    artifact = artifacts.commit(ctx.store, ctx.resolved, metrics=metrics, started=started)
    return Outcome(artifact_digest=artifact.digest, metrics=artifact.metrics)


def outcome_of(error: BaseException, *, rank: int) -> tuple[Outcome, ExitCode]:
    """What to say of an exception that ended this rank."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = error.filename or "the scratch folder"
        error = StorageError(f"{where}: no space left on the device: free some, or mount a larger scratch volume")
    fault, code = fault_of(error)
    named = isinstance(error, UserError | StorageError)
    message = str(error) if named else "".join(traceback.format_exception_only(error)).strip()
    step = getattr(error, "step", None)
    return Outcome(fault=fault, reason=type(error).__name__, message=message[:2000], step=step, rank=rank), code


def main(argv: list[str]) -> int:
    """Run one rank; the exit code is one of ``ExitCode``."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    ctx: StageContext | None = None
    rank, code = int(os.environ.get("RANK", "0")), ExitCode.OK
    die_with_parent()
    try:
        ctx = context_from_environment(Path(argv[0]))
        ctx.report(phase="Starting")
        outcome = run_stage(ctx)
    except Exception as error:
        outcome, code = outcome_of(error, rank=rank)
        if code in (ExitCode.PROCESS, ExitCode.STORAGE):
            log.error("%s", "".join(traceback.format_exception(error)))
        log.error("%s: %s", outcome.reason, outcome.message)
    record = {"time": time.time(), "outcome": json.loads(outcome.model_dump_json(by_alias=True))}
    try:
        write_atomically(Path(os.environ["HEADRACE_SCRATCH"]) / OUTCOMES / f"{rank}.json", json.dumps(record))
    except OSError as error:
        log.error("the outcome could not be written: %s", error)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads and forked writers of a failed collective must not keep a dead rank alive.
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
