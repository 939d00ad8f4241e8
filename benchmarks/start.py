"""From the start of a pod to the first training step of its ranks: ``python benchmarks/start.py``.

The agent, whose launcher imports once and forks the ranks, beside torchrun, which starts a Python for each: the same
stage with the same inputs, in turns. ``--before FOLDER`` adds the agent of another checkout of this repository, as it was
at an earlier commit. On a busy machine look at the processor time: a way that starts more processes is given more of it.
"""

import argparse
import contextlib
import json
import os
import platform
import pydoc_data.topics
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_api.artifact import ArtifactRef, stage_hash
from headrace_api.contract import Progress, ResolvedStage
from headrace_api.run import Stage
from headrace_trainer.board import BOARD_VARIABLE, Board
from headrace_trainer.processes import cpu_seconds
from headrace_trainer.stage import StageContext, run_stage

RESULTS = Path(__file__).parent / "results"
RANKS = 2
MODEL = {"layers": 2, "hiddenSize": 32, "heads": 4, "kvHeads": 2, "ffnHiddenSize": 64}
PRETRAIN = {
    "from": {"shards": "tokens"},
    "model": MODEL,
    "tokens": 100_000 * 8 * 32,
    "sequenceLength": 32,
    "globalBatchSize": 8,
    "precision": "fp32",
    "parallelism": {"tensor": RANKS},
    "checkpoint": {"every": 100_000},
}
TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Start:
    """What one start took."""

    wall_seconds: float
    cpu_seconds: float
    """Of all its processes."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A stage that is ready to be started."""

    folder: Path
    stage_file: Path
    progress: Path


def main() -> int:
    """Measure every way in turns, print the medians and write them to ``results/start.json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="a checkout of this repository at an earlier commit")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is killed then too
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(Path(folder))
        ways: dict[str, Callable[[], Start]] = {
            "agent": lambda: start_agent(prepared),
            "torchrun": lambda: start_torchrun(prepared),
        }
        if arguments.before is not None:
            ways["before"] = lambda: start_agent(prepared, checkout=arguments.before.resolve())
        starts: dict[str, list[Start]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, start in ways.items():
                starts[name].append(start())
                took = starts[name][-1]
                print(f"{name:10} {took.wall_seconds:6.2f} s, {took.cpu_seconds:6.2f} s of processors", flush=True)
    report(starts)
    return 0


def report(starts: dict[str, list[Start]]) -> None:
    """Print and write the medians, and how the agent compares in each round."""
    figures: dict[str, Any] = {
        "ranks": RANKS,
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()},
    }
    for measure in ("wall_seconds", "cpu_seconds"):
        seconds = {name: [getattr(start, measure) for start in taken] for name, taken in starts.items()}
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        ratios = {
            name: statistics.median(a / b for a, b in zip(seconds["agent"], times, strict=True))
            for name, times in seconds.items()
        }
        for name, median in medians.items():
            print(f"{measure}: {name} {median:.2f}; the agent needs {ratios[name]:.0%} of that")
        figures[measure] = {"medians": medians, "agentToOther": ratios, "all": seconds}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "start.json").write_text(json.dumps(figures, indent=1) + "\n")


def start_agent(prepared: Prepared, *, checkout: Path | None = None) -> Start:
    """From the start of an agent to the report of the first step."""
    path = {} if checkout is None else {"PYTHONPATH": os.pathsep.join(str(checkout / p) for p in ("trainer", "api"))}
    prepared.progress.unlink(missing_ok=True)
    env = path | {
        "HEADRACE_SCRATCH": str(prepared.folder / "scratch"),
        "HEADRACE_TERMINATION_FILE": str(prepared.folder / "outcome.json"),
        "HEADRACE_MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-m", "headrace_trainer.agent", str(prepared.stage_file)]

    def done() -> int:
        try:
            return Progress.model_validate_json(prepared.progress.read_text()).done
        except FileNotFoundError:
            return 0

    return until_first_step(command, env, done, prepared)


def start_torchrun(prepared: Prepared) -> Start:
    """From the start of torchrun to the report of the first step."""
    board = Board.create(RANKS)
    scratch = prepared.folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    env = {"HEADRACE_SCRATCH": str(scratch), BOARD_VARIABLE: f"/proc/{os.getpid()}/fd/{board.fd}"}
    words = ["--nnodes=1", f"--nproc-per-node={RANKS}", f"--master-port={free_port()}", "--max-restarts=0"]
    stage = ["--module", "headrace_trainer.stage", str(prepared.stage_file)]
    command = [sys.executable, "-m", "torch.distributed.run", *words, *stage]

    def done() -> int:
        text = board.slots[0].progress
        return 0 if text is None else Progress.model_validate_json(text).done

    return until_first_step(command, env, done, prepared)


def until_first_step(command: list[str], env: dict[str, str], done: Callable[[], int], prepared: Prepared) -> Start:
    """Start a command, wait for a first step, end it."""
    began = time.perf_counter()
    with (prepared.folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while done() < 1:
                if process.poll() is not None or time.perf_counter() - began > TIMEOUT_SECONDS:
                    raise RuntimeError((prepared.folder / "log").read_text()[-3000:])
                time.sleep(0.01)
            return Start(wall_seconds=time.perf_counter() - began, cpu_seconds=cpu_seconds(process.pid))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # launchers and ranks die with their parents
            process.wait()
            time.sleep(1)


def prepare(folder: Path) -> Prepared:
    """Text, a tokenizer and shards; and the pretrain stage that reads them."""
    raw = folder / "raw"
    raw.mkdir()
    for name, text in pydoc_data.topics.topics.items():
        (raw / f"{name.replace('/', '-')}.txt").write_text(text)
    quality = {"minWords": 20, "minAlphabeticWordRatio": 0.5, "maxSymbolToWordRatio": 1.0, "maxBulletLineRatio": 1.0}
    corpus = make(folder, "corpus", {"sources": [{"uri": str(raw)}], "quality": quality}, {})
    tokenizer = make(folder, "tokenizer", {"from": {"corpus": "corpus"}, "vocabSize": 512}, {"corpus": corpus})
    config = {"from": {"corpus": "corpus", "tokenizer": "tokenizer"}, "validationRatio": 0.1}
    shards = make(folder, "shards", config, {"corpus": corpus, "tokenizer": tokenizer})
    progress = folder / "progress.json"
    stage = resolve(folder, "pretrain", PRETRAIN, {"shards": shards}, progress_url=f"file://{progress}")
    text = stage.model_dump_json(by_alias=True, exclude_defaults=True)  # which an earlier commit may not know
    (folder / "stage.json").write_text(text)
    return Prepared(folder=folder, stage_file=folder / "stage.json", progress=progress)


def make(folder: Path, kind: str, config: dict[str, Any], inputs: dict[str, ArtifactRef]) -> ArtifactRef:
    """Run a data stage; what it left."""
    stage = resolve(folder, kind, config, inputs)
    outcome = run_stage(StageContext(resolved=stage, scratch=folder / f"scratch-{kind}"))
    assert outcome.artifact_digest is not None
    return ArtifactRef(uri=stage.output_uri, digest=outcome.artifact_digest, kind=stage.stage.config.GIVES)


def resolve(
    folder: Path, kind: str, config: dict[str, Any], inputs: dict[str, ArtifactRef], **fields: Any
) -> ResolvedStage:
    """A stage whose name is its kind's."""
    compute = {"compute": {"ranksPerNode": RANKS}} if kind == "pretrain" else {}
    stage = Stage.model_validate({"name": kind, **compute, kind: config})
    digests = {slot: ref.digest for slot, ref in inputs.items()}
    return ResolvedStage.model_validate(
        {
            "run": "start",
            "stage": stage,
            "attempt": 1,
            "seed": 1,
            "hash": stage_hash(stage.config, seed=1, inputs=digests),
            "inputs": inputs,
            "storage": {"uri": str(folder / "storage")},
            "outputUri": str(folder / "storage" / kind),
            **fields,
        }
    )


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
