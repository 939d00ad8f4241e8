"""What Headrace's loop costs beside a bare Megatron-core one: ``python -m benchmarks.loop``.

Two trainings run in the same processes, in turns of a few steps: the same model from the same seed, the same data,
optimizer and schedule. One is ``engine.loop`` with everything it does at a step (agreement on stops and saves, checks,
history, heartbeats); the other is the least that Megatron-core's own examples do. Both end with the same losses, which is
checked. What is compared is each turn with the turn beside it, so that a busy machine disturbs both alike.
"""

import argparse
import datetime
import gc
import json
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.training import ONE_RANK, Bare, RandomSamples, Training, opened
from headrace_api.model import Architecture
from headrace_api.parallelism import Layout
from headrace_api.stages.training import Precision
from headrace_trainer.engine.parallel import Sum

RESULTS = Path(__file__).parent / "results"
LIMIT = 1.03
"""The loop may cost this much of the bare one."""

TRAININGS = {
    "tiny": Training(
        architecture=Architecture(layers=4, hidden_size=64, heads=4, kv_heads=2, ffn_hidden_size=176),
        vocab_size=1000,
        length=32,
        global_batch=8,
        micro_batch=1,
        steps=1,
        precision=Precision.FP32,
    ),
    "small": Training(
        architecture=Architecture(layers=8, hidden_size=256, heads=8, kv_heads=4, ffn_hidden_size=768),
        vocab_size=8000,
        length=256,
        global_batch=4,
        micro_batch=1,
        steps=1,
        precision=Precision.FP32,
    ),
}
LAYOUTS = {
    "1 rank": ONE_RANK,
    "DP2": Layout(tensor=1, pipeline=1, data=2),
    "TP2": Layout(tensor=2, pipeline=1, data=1),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    model: str
    layout: str
    training: Training
    rounds: int
    """Turns of each training that are counted; one comes before them."""
    steps: int
    """Steps in a turn."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one rank needed for the steps of a turn."""

    wall_seconds: float
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds of a step, and the ratio of neighbouring turns: medians, and the ratio's quartiles."""

    ours: float
    bare: float
    ratio: float
    ratio_quartiles: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A case's figures."""

    model: str
    layout: str
    rounds: int
    steps: int
    wall: Times
    """Of rank 0."""
    cpu: Times
    """User and system time of all ranks."""
    wait_microseconds: float
    """Median time for which rank 0 waited for the sums of a step."""
    largest_loss_difference: float


def compare(case: Case, rank: int, folder: Path) -> Outcome | None:
    """Both trainings on one rank; rank 0 has the figures."""
    steps = (case.rounds + 1) * case.steps
    training = replace(case.training, layout=LAYOUTS[case.layout], steps=steps, warmup=min(3, steps // 2))
    samples, waits = RandomSamples(training), note_waits()
    with opened(training, folder, samples=samples, rank=rank) as loop:
        bare = Bare(training, loop.gang, samples)

        def take_turn(advance: Callable[[], None], *, collector: Callable[[], None]) -> Turn:
            collector()
            loop.gang.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(case.steps):
                advance()
            if loop.gang.device.type == "cuda":
                torch.cuda.synchronize()
            return Turn(wall_seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)

        def a_round(ours_first: bool) -> tuple[Turn, Turn]:
            if not ours_first:
                theirs = take_turn(bare.advance, collector=gc.enable)
            ours = take_turn(loop.advance, collector=gc.disable)  # as in Loop.run
            if ours_first:
                theirs = take_turn(bare.advance, collector=gc.enable)
            return ours, theirs

        gc.collect()
        gc.freeze()
        a_round(True)
        rounds = loop.gang.gather([a_round(i % 2 == 0) for i in range(case.rounds)])
        of_replicas = loop.gang.gather(bare.losses)
        if rank != 0:
            return None
        pairs = zip((r["loss"] for r in loop.history.records), zip(*of_replicas, strict=True), strict=True)
        difference = max(abs(ours - statistics.mean(theirs)) for ours, theirs in pairs)
    assert difference < (1e-4 if training.precision is Precision.FP32 else 1e-2), f"losses differ by {difference} nats"
    return summarize(case, rounds, wait_seconds=statistics.median(waits), difference=difference)


def note_waits() -> list[float]:
    """Seconds of every wait for a step's sums, from here on."""
    waits: list[float] = []
    result = Sum.result

    def timed(self: Sum) -> list[float]:
        begun = time.perf_counter()
        found = result(self)
        waits.append(time.perf_counter() - begun)
        return found

    Sum.result = timed  # type: ignore[method-assign]
    return waits


def summarize(case: Case, rounds: list[list[tuple[Turn, Turn]]], *, wait_seconds: float, difference: float) -> Outcome:
    """Figures of a case.

    Args:
        case: what was compared.
        rounds: of each rank, our turn and the bare one of each round.
        wait_seconds: median wait for a step's sums.
        difference: largest difference of losses, in nats.
    """
    return Outcome(
        model=case.model,
        layout=case.layout,
        rounds=case.rounds,
        steps=case.steps,
        wall=times([(a.wall_seconds, b.wall_seconds) for a, b in rounds[0]], steps=case.steps),
        cpu=times(
            [
                (sum(a.cpu_seconds for a, _ in ranks), sum(b.cpu_seconds for _, b in ranks))
                for ranks in zip(*rounds, strict=True)
            ],
            steps=case.steps,
        ),
        wait_microseconds=1e6 * wait_seconds,
        largest_loss_difference=difference,
    )


def times(pairs: list[tuple[float, float]], *, steps: int) -> Times:
    """Figures of our turns and the bare ones, in seconds."""
    ratios = [ours / bare for ours, bare in pairs]
    first, _, third = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return Times(
        ours=1e3 / steps * statistics.median(ours for ours, _ in pairs),
        bare=1e3 / steps * statistics.median(bare for _, bare in pairs),
        ratio=statistics.median(ratios),
        ratio_quartiles=(first, third),
    )


def _rank(case: Case, rank: int, folder: Path, port: int, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if (outcome := compare(case, rank, folder)) is not None:
        results.put(outcome)


def run(case: Case) -> Outcome:
    """Start a case's ranks and wait for its figures.

    Raises:
        RuntimeError: a rank failed.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank, args=(case, rank, Path(folder), port, results))
            for rank in range(LAYOUTS[case.layout].world)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise RuntimeError(f"{case.model}, {case.layout}: ranks ended with {[rank.exitcode for rank in ranks]}")
        found: Outcome = results.get()
    return found


def table(outcomes: list[Outcome]) -> str:
    """The figures as Markdown."""
    lines = [
        "| model | layout | ms/step | bare | ratio (quartiles) | CPU ms/step | bare | ratio (quartiles) | waits for sums |",
        "|" + "---|" * 9,
    ]
    for o in outcomes:
        columns = [o.model, o.layout]
        for t in (o.wall, o.cpu):
            low, high = t.ratio_quartiles
            columns += [f"{t.ours:.1f}", f"{t.bare:.1f}", f"{t.ratio:.3f} ({low:.3f} to {high:.3f})"]
        lines.append("| " + " | ".join([*columns, f"{o.wait_microseconds:.0f} us"]) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure the cases, print a table, write JSON; 1 where the loop costs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TRAININGS, action="append", help="all if left out")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="all that fit the machine if left out")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each training")
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn; more of them where they are short")
    parser.add_argument("--out", type=Path, default=RESULTS / "loop.json")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    devices = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    layouts = args.layout or [name for name, axes in LAYOUTS.items() if axes.world <= devices]
    outcomes = []
    for model in args.model or TRAININGS:
        for layout in layouts:
            case = Case(model=model, layout=layout, training=TRAININGS[model], rounds=args.rounds, steps=args.steps)
            outcomes.append(run(case))
            print(table(outcomes[-1:]), flush=True)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.loop", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "outcomes": [asdict(o) for o in outcomes],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table(outcomes)}\n\nwritten to {args.out}")
    return int(any(o.cpu.ratio > LIMIT for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
