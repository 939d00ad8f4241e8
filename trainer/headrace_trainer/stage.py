"""One rank of a stage: ``python -m headrace_trainer.stage stage.json``, or ``main`` in a forked process.

In: a ``ResolvedStage`` and the environment set by the agent's launcher. ``stages.<kind>.run`` does the work; its
``ctx.output`` is committed as the stage's artifact. Out, on the rank's slot of the board: progress, and at the end an
``Outcome``, from which the agent makes the pod's termination message.
"""

import contextlib
import errno
import faulthandler
import importlib
import logging
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from headrace_api.contract import STARTING_PHASE, Progress, ResolvedStage
from headrace_api.faults import ExitCode, Outcome
from headrace_api.stages import StageConfig
from headrace_trainer import artifacts, board, inputs
from headrace_trainer.errors import PeersMissing, Stopped, StorageError, UserError, fault_of
from headrace_trainer.processes import die_with_parent, let_stacks_be_read, name_process
from headrace_trainer.storage import ObjectStore, open_store, open_uri

STOP_FILE = "stop"
EVIDENCE = "evidence"
"""Folder in the scratch folder for evidence of a hang; it outlives the attempt."""
STACK_SIGNAL = signal.SIGUSR1
"""Makes a rank dump its threads' stacks to its ``stacks_file``."""

log = logging.getLogger("headrace")


@dataclass(kw_only=True)
class StageContext:
    """What a stage gets: its configuration, its inputs, and somewhere to put its results."""

    resolved: ResolvedStage
    scratch: Path
    """A folder on this node for this attempt alone."""
    cache: Path | None = None
    """A folder on this node that outlives attempts, if there is one."""
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    index: int = 0
    """The pod's completion index."""
    store: ObjectStore = field(init=False)
    slot: board.Slot | None = None
    """Where this rank reports; None without an agent."""

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
        """Its files become the artifact. Each pod writes a part; paths must differ between pods."""
        return self.scratch / "output"

    def input(self, slot: str) -> Path:
        """A local folder with the verified files of an input, shared by the node's ranks.

        Raises:
            StorageError: the artifact is missing or corrupt.
        """
        ref = self.resolved.inputs[slot]
        self.report(phase=STARTING_PHASE, message=f"reading the {slot}")
        return inputs.fetch(open_uri(ref.uri, self.resolved.storage), ref, cache=self.cache or self.scratch / "inputs")

    def stop_requested(self) -> bool:
        """Whether this pod was asked to stop. Other pods may not know yet, so ranks must agree on it."""
        return (self.scratch / STOP_FILE).exists()

    def report(self, **fields: Any) -> None:
        """Report this rank's progress, with any fields of ``Progress``: at each step and each change of phase.

        The agent takes a rank for hung if it is silent for much longer than ever before; in a long phase, call
        ``board.beat`` as things get done.
        """
        if self.slot is not None:
            stage, attempt = self.resolved.stage.name, self.resolved.attempt
            progress = Progress(stage=stage, attempt=attempt, time=datetime.now(UTC), **fields)
            self.slot.report(progress.model_dump_json(by_alias=True))


def write_atomically(path: Path, text: str) -> None:
    """Write a small file such that readers see the old or the new text, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(text)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def context_from_environment(stage_file: Path, *, slot: board.Slot | None = None) -> StageContext:
    """This rank's context, from the environment: ``HEADRACE_*``, ``JOB_COMPLETION_INDEX`` and torch's variables."""
    env = os.environ
    return StageContext(
        resolved=ResolvedStage.model_validate_json(stage_file.read_text()),
        scratch=Path(env["HEADRACE_SCRATCH"]),
        cache=Path(env["HEADRACE_CACHE"]) if env.get("HEADRACE_CACHE") else None,
        rank=int(env.get("RANK", env.get("JOB_COMPLETION_INDEX", "0"))),
        world=int(env.get("WORLD_SIZE", "1")),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        index=int(env.get("JOB_COMPLETION_INDEX", "0")),
        slot=slot,
    )


def run_stage(ctx: StageContext) -> Outcome:
    """Do the stage's work and commit its artifact.

    Returns:
        This rank's outcome; that of rank 0 has the artifact's digest.
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
    """The outcome and exit code for an exception that ended this rank."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = error.filename or "the scratch folder"
        error = StorageError(f"{where}: no space left on the device: free some, or mount a larger scratch volume")
    fault, code = fault_of(error)
    named = isinstance(error, UserError | StorageError | PeersMissing | Stopped)
    message = str(error) if named else "".join(traceback.format_exception_only(error)).strip()
    step = getattr(error, "step", None)
    return Outcome(fault=fault, reason=type(error).__name__, message=message[:2000], step=step, rank=rank), code


def stacks_file(scratch: Path, local_rank: int) -> Path:
    """Where a rank dumps its stacks on ``STACK_SIGNAL``."""
    return scratch / f"stacks-{local_rank}.txt"


def main(argv: list[str]) -> NoReturn:
    """Run one rank and end this process with an ``ExitCode``."""
    rank, code = int(os.environ.get("RANK", "0")), ExitCode.OK
    where = f"rank {rank} " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {where}%(levelname)s %(message)s", stream=sys.stderr)
    die_with_parent()
    name_process(f"rank {rank}")
    slot = board.take_slot(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        ctx = context_from_environment(Path(argv[0]), slot=slot)
        _show_stacks_when_asked(ctx)
        ctx.report(phase=STARTING_PHASE)
        outcome = run_stage(ctx)
    except BaseException as error:
        outcome, code = outcome_of(error, rank=rank)
        if code in (ExitCode.PROCESS, ExitCode.STORAGE):
            log.error("%s", "".join(traceback.format_exception(error)))
        log.error("%s: %s", outcome.reason, outcome.message)
    if slot is not None:
        slot.say(outcome.model_dump_json(by_alias=True))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads and forked writers of a failed collective must not keep a dead rank alive.
    os._exit(code)


def _show_stacks_when_asked(ctx: StageContext) -> None:
    """Allow stack dumps for hang diagnosis: debuggers may attach, and a signal triggers a dump."""
    let_stacks_be_read()
    faulthandler.enable()
    with contextlib.suppress(OSError):  # on a full disk, whatever needs the space reports it
        file = stacks_file(ctx.scratch, ctx.local_rank).open("w")
        faulthandler.register(STACK_SIGNAL, file=file, all_threads=True)


if __name__ == "__main__":
    main(sys.argv[1:])
