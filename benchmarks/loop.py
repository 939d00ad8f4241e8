"""What Headrace's loop costs beside a bare Megatron-core one: ``python benchmarks/loop.py``.

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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from headrace_api.contract import ResolvedStage
from headrace_api.parallelism import Layout
from headrace_trainer.engine.parallel import Sum, join_gang
from headrace_trainer.formats.model_card import describe
from headrace_trainer.stage import StageContext

RESULTS = Path(__file__).parent / "results"
VOCAB = 8000
LIMIT = 1.03
"""The loop may cost this much of the bare one."""

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 4, "hiddenSize": 64, "heads": 4, "kvHeads": 2, "ffnHiddenSize": 176},
    "small": {"layers": 8, "hiddenSize": 256, "heads": 8, "kvHeads": 4, "ffnHiddenSize": 768},
}
LENGTHS = {"tiny": 32, "small": 256}
LAYOUTS = {
    "1 rank": Layout(tensor=1, pipeline=1, data=1),
    "DP2": Layout(tensor=1, pipeline=1, data=2),
    "TP2": Layout(tensor=2, pipeline=1, data=1),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    size: str
    layout: str
    rounds: int
    steps: int
    """Steps in a turn."""

    @property
    def total_steps(self) -> int:
        """Steps of each training, the first turn included, which is not counted."""
        return (self.rounds + 1) * self.steps


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one rank needed for the steps of a turn."""

    wall_seconds: float
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A case's figures; times are medians of a step, ratios medians over neighbouring turns."""

    size: str
    layout: str
    rounds: int
    steps: int
    wall_milliseconds: float
    bare_wall_milliseconds: float
    wall_ratio: float
    wall_ratio_quartiles: list[float]
    cpu_milliseconds: float
    bare_cpu_milliseconds: float
    cpu_ratio: float
    cpu_ratio_quartiles: list[float]
    exchange_wait_microseconds: float
    """Median time for which a step waited for its sums, of rank 0."""
    largest_loss_difference: float


class RandomSamples:
    """Tokens without meaning; both trainings read the same."""

    num_samples = 64

    def __init__(self, length: int) -> None:
        self._tokens = np.random.default_rng(0).integers(0, VOCAB, (self.num_samples, length + 1))

    def sample(self, index: int) -> np.ndarray:
        """Sample ``index``, again from the start where there are no more."""
        found: np.ndarray = self._tokens[index % self.num_samples]
        return found


def resolved(case: Case, folder: Path) -> ResolvedStage:
    """The pretrain stage that both trainings do."""
    length, world = LENGTHS[case.size], LAYOUTS[case.layout].world
    pretrain = {
        "from": {"shards": "shards"},
        "model": SIZES[case.size],
        "tokens": case.total_steps * 8 * length,
        "sequenceLength": length,
        "globalBatchSize": 8,
        "microBatchSize": 1,
        "precision": "fp32",
        "parallelism": {"tensor": LAYOUTS[case.layout].tensor},
        "schedule": {"learningRate": 1e-3, "warmup": 3},
        "checkpoint": {"every": 10**6},
        "validation": {"every": 10**6, "samples": 1},
    }
    return ResolvedStage.model_validate(
        {
            "run": "benchmark",
            "stage": {"name": "pretrain", "compute": {"ranksPerNode": world}, "pretrain": pretrain},
            "attempt": 1,
            "seed": 1,
            "hash": "a" * 64,
            "inputs": {"shards": {"uri": str(folder), "digest": "d" * 64, "kind": "shards"}},
            "storage": {"uri": str(folder / "storage")},
            "outputUri": str(folder / "storage" / "pretrain"),
        }
    )


class Bare:
    """The least that trains: Megatron-core's schedule, optimizer and rate, and the loss on the host once a step."""

    def __init__(self, stage: ResolvedStage, gang: Any, samples: RandomSamples) -> None:
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        from headrace_trainer.engine.device import megatron as m
        from headrace_trainer.engine.model.build import build_model
        from headrace_trainer.engine.model.start import fill_start_weights

        self.config, self.gang, self.samples, self.step, self.losses = stage.stage.config, gang, samples, 0, []
        c: Any = self.config
        model = build_model(
            c.model.architecture, gang=gang, vocab_size=VOCAB, sequence_length=c.sequence_length, precision=c.precision
        )
        fill_start_weights(model, c.model.architecture, seed=stage.seed)
        overlap = gang.layout.data > 1
        settings = m.DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
        )
        self.model = m.DistributedDataParallel(model.config, settings, model)
        model.config.finalize_model_grads_func = m.finalize_model_grads
        model.config.no_sync_func = self.model.no_sync if overlap else None
        optimizer = m.OptimizerConfig(
            optimizer="adam",
            lr=c.schedule.learning_rate,
            min_lr=c.schedule.final_rate,
            weight_decay=c.optimizer.weight_decay,
            adam_beta1=c.optimizer.beta1,
            adam_beta2=c.optimizer.beta2,
            adam_eps=c.optimizer.epsilon,
            clip_grad=c.optimizer.clip_norm,
            params_dtype=torch.float32,
            use_distributed_optimizer=True,
        )
        self.optimizer = m.get_megatron_optimizer(optimizer, [self.model], use_gloo_process_groups=False)
        model.config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=c.schedule.learning_rate,
            min_lr=c.schedule.final_rate,
            lr_warmup_steps=c.schedule.warmup,
            lr_decay_steps=c.steps,
            lr_decay_style="cosine",
            start_wd=c.optimizer.weight_decay,
            end_wd=c.optimizer.weight_decay,
            wd_incr_steps=c.steps,
            wd_incr_style="constant",
        )
        self.scheduler.step(increment=1)
        self.forward_backward = m.get_forward_backward_func()

    def advance(self) -> None:
        """One step."""
        c: Any = self.config
        num_micro_batches = c.global_batch_size // self.gang.layout.data
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        found = self.forward_backward(
            forward_step_func=self._forward,
            data_iterator=self._micro_batches(num_micro_batches),
            model=[self.model],
            num_microbatches=num_micro_batches,
            seq_length=c.sequence_length,
            micro_batch_size=1,
            forward_only=False,
        )
        self.optimizer.step()
        self.scheduler.step(increment=1)
        self.losses.append(torch.stack(found).sum().item() / (num_micro_batches * c.sequence_length))
        self.step += 1

    def _micro_batches(self, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        first = self.step * self.config.global_batch_size + self.gang.data_rank
        for i in range(count):
            sample = torch.from_numpy(self.samples.sample(first + i * self.gang.layout.data))[None]
            yield sample[:, :-1].contiguous().to(self.gang.device), sample[:, 1:].contiguous().to(self.gang.device)

    def _forward(self, micro_batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        tokens, labels = next(micro_batches)
        positions = torch.arange(tokens.size(1), device=tokens.device)[None]
        output = model(tokens, positions, None, labels=labels)

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            total = output.float().sum()
            return total, torch.tensor(output.numel(), dtype=torch.int32, device=output.device), total.detach().clone()

        return output, loss


def measure(rank: int, case: Case, folder: Path) -> Outcome | None:
    """Both trainings on one rank; rank 0 has the figures."""
    from headrace_trainer.stages.pretrain.stage import build_loop

    torch.set_num_threads(1)
    layout, stage = LAYOUTS[case.layout], resolved(case, folder)
    ctx = StageContext(resolved=stage, scratch=folder / "scratch", rank=rank, world=layout.world, local_rank=rank)
    config: Any = stage.stage.config
    card = describe(
        config.model.architecture,
        vocab_size=VOCAB,
        eod_id=0,
        sequence_length=config.sequence_length,
        precision=config.precision,
    )
    waits = note_waits()
    with join_gang(layout, rank=rank, local_rank=rank, local_world=layout.world) as gang:
        samples = RandomSamples(config.sequence_length)
        loop = build_loop(ctx, gang, card, training=samples, validation=samples)
        loop.resume()
        bare = Bare(stage, gang, samples)

        def take_turn(advance: Callable[[], None]) -> Turn:
            gang.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(case.steps):
                advance()
            return Turn(wall_seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)

        def ours() -> Turn:
            gc.disable()  # as in Loop.run
            return take_turn(loop.advance)

        def theirs() -> Turn:
            gc.enable()
            return take_turn(bare.advance)

        gc.collect()
        gc.freeze()
        ours(), theirs()
        turns: list[tuple[Turn, Turn]] = []
        for i in range(case.rounds):
            first = ours() if i % 2 == 0 else theirs()
            second = theirs() if i % 2 == 0 else ours()
            turns.append((first, second) if i % 2 == 0 else (second, first))
        all_turns = gang.gather(turns)
        replicas = gang.gather(bare.losses)
        if rank != 0:
            return None
        bare_losses = [statistics.mean(step) for step in zip(*replicas, strict=True)]
        mine = [record["loss"] for record in loop.history.records]
        difference = max(abs(a - b) for a, b in zip(mine, bare_losses, strict=True))
        assert difference < 1e-4, f"the two trainings differ by {difference} nats"
        return summarize(case, all_turns, waits=waits, difference=difference)


def note_waits() -> list[float]:
    """Seconds of every wait for a step's sums from here on."""
    waits: list[float] = []
    result = Sum.result

    def timed(self: Sum) -> list[float]:
        begun = time.perf_counter()
        found = result(self)
        waits.append(time.perf_counter() - begun)
        return found

    Sum.result = timed  # type: ignore[method-assign]
    return waits


def summarize(case: Case, turns: list[list[tuple[Turn, Turn]]], *, waits: list[float], difference: float) -> Outcome:
    """Figures of a case: wall time is rank 0's, CPU time that of all ranks."""
    per_step = 1e3 / case.steps
    wall = [(a.wall_seconds * per_step, b.wall_seconds * per_step) for a, b in turns[0]]
    cpu = [
        tuple(sum(turn[who].cpu_seconds for turn in round_) * per_step for who in (0, 1))
        for round_ in zip(*turns, strict=True)
    ]
    return Outcome(
        **asdict(case),
        wall_milliseconds=statistics.median(a for a, _ in wall),
        bare_wall_milliseconds=statistics.median(b for _, b in wall),
        wall_ratio=statistics.median(a / b for a, b in wall),
        wall_ratio_quartiles=quartiles([a / b for a, b in wall]),
        cpu_milliseconds=statistics.median(a for a, _ in cpu),
        bare_cpu_milliseconds=statistics.median(b for _, b in cpu),
        cpu_ratio=statistics.median(a / b for a, b in cpu),
        cpu_ratio_quartiles=quartiles([a / b for a, b in cpu]),
        exchange_wait_microseconds=1e6 * statistics.median(waits),
        largest_loss_difference=difference,
    )


def quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4)
    return [first, third]


def _rank(rank: int, case: Case, folder: Path, port: int, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    outcome = measure(rank, case, folder)
    if outcome is not None:
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
            context.Process(target=_rank, args=(rank, case, Path(folder), port, results))
            for rank in range(LAYOUTS[case.layout].world)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise RuntimeError(f"{case}: ranks ended with {[rank.exitcode for rank in ranks]}")
        found: Outcome = results.get()
    return found


def table(outcomes: list[Outcome]) -> str:
    """The figures as Markdown."""
    head = "| model | layout | ms/step | bare | ratio (quartiles) | CPU ms/step | bare | ratio (quartiles) | waits for sums |"
    lines = [head, "|" + "---|" * 9]
    for o in outcomes:
        wall, cpu = o.wall_ratio_quartiles, o.cpu_ratio_quartiles
        lines.append(
            f"| {o.size} | {o.layout} | {o.wall_milliseconds:.1f} | {o.bare_wall_milliseconds:.1f} | "
            f"{o.wall_ratio:.3f} ({wall[0]:.3f} to {wall[1]:.3f}) | {o.cpu_milliseconds:.1f} | "
            f"{o.bare_cpu_milliseconds:.1f} | {o.cpu_ratio:.3f} ({cpu[0]:.3f} to {cpu[1]:.3f}) | "
            f"{o.exchange_wait_microseconds:.0f} us |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure the cases, print a table, write JSON; 1 where the loop costs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, action="append", help="of the model; all if left out")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="all that fit the machine if left out")
    parser.add_argument("--rounds", type=int, default=60, help="turns of each training")
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn")
    parser.add_argument("--out", type=Path, default=RESULTS / "loop.json")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    devices = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    layouts = args.layout or [name for name, axes in LAYOUTS.items() if axes.world <= devices]
    outcomes = []
    for size in args.size or SIZES:
        for layout in layouts:
            outcomes.append(run(Case(size=size, layout=layout, rounds=args.rounds, steps=args.steps)))
            print(table(outcomes[-1:]), flush=True)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "outcomes": [asdict(o) for o in outcomes],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table(outcomes)}\n\nwritten to {args.out}")
    return int(any(o.cpu_ratio > LIMIT for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
