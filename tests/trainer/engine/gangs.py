"""Real gangs for tests: ranks are processes on gloo, forked from a server that has imported Megatron once.

``train(run, layout)`` runs the pretrain loop on synthetic tokens under any layout, and says what every rank ended with.
"""

import contextlib
import math
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from headrace_api.contract import ResolvedStage

TP1 = {"tensor": 1, "pipeline": 1, "data": 1}
TP2 = {**TP1, "tensor": 2}
PP2 = {**TP1, "pipeline": 2}
DP2 = {**TP1, "data": 2}
TP2_PP2 = {"tensor": 2, "pipeline": 2, "data": 1}

# A process that has looked for a GPU cannot be forked.
_SERVER: Any = multiprocessing.get_context("spawn" if Path("/dev/nvidiactl").exists() else "forkserver")
_SERVER.set_forkserver_preload(["headrace_trainer.stages.pretrain.stage"])
_TIMEOUT_SECONDS = 300.0

LENGTH, BATCH = 32, 8


@dataclass(frozen=True, kw_only=True)
class Run:
    """A pretrain stage on synthetic tokens."""

    folder: Path
    steps: int = 20
    every: int = 1000
    attempt: int = 1
    seed: int = 7
    vocab_size: int = 250
    precision: str = "fp32"
    learning_rate: float = 3e-3
    length: int = LENGTH
    """Tokens in a sample; an odd one cannot be split over tensor ranks, which switches sequence parallelism off."""
    shards_digest: str = "d" * 64
    model: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    die_at: int | None = None
    """The last rank kills itself while it reads the batch of this step (counted from 0). Checkpoints that were begun
    before the step before it are committed then, and no others."""
    die_before: str | None = None
    """Rank 0 is killed before a key that ends like this is stored."""
    die_after: str | None = None
    """Rank 0 is killed when a key that ends like this was stored."""
    writer_dies_before: str | None = None
    """What stores a key that ends like this on rank 0 is killed before."""
    held: str | None = None
    """Storing a key that ends like this on rank 0 lasts until the batch of step ``released_at`` is read."""
    released_at: int = 0
    slow_while_held: bool = False
    """Steps take half a second until then, and note in ``on-their-way`` how many checkpoints are."""
    stop_at: int | None = None
    """The last rank is asked to stop while it reads the batch of this step."""
    full_at: int | None = None
    """The last rank can write no file of more than 20 kB from this step on, as on a disk that is nearly full."""
    room_at: int | None = None
    """It can again from this step on."""
    first_is_full: bool = False
    """The first rank can write no file of more than 4 kB, from the first step on."""
    bucket_size: int | None = None
    """Parameters in a bucket whose gradients are reduced together; one bucket holds them all if None."""
    bad_steps: tuple[int, ...] = ()
    """Steps (counted from 0) at which the last replica's part of the batch has a loss of NaN."""
    nodes: bool = False
    """Whether every rank has a scratch folder of its own, as on nodes of their own."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a rank ended: what it returned, or what it raised, or the signal that killed it."""

    value: Any = None
    error: str = ""
    message: str = ""
    exit_code: int | None = 0


def train(run: Run, layout: dict[str, int]) -> list[Ended]:
    """Train under a layout; what each rank ended with, by rank. A good rank ends with ``Trained``."""
    world = layout["tensor"] * layout["pipeline"] * layout["data"]
    return gang(train_rank, world, run, layout)


def began(run: Run) -> list[int]:
    """The first step of every attempt so far, those that were killed included."""
    return [int(path.read_text()) for path in sorted(run.folder.glob("began-*"))]


def losses(run: Run, layout: dict[str, int]) -> list[float]:
    """The loss of every step of a run that must end well."""
    ended = train(run, layout)
    assert not any(e.error for e in ended), ended
    return [record["loss"] for record in ended[0].value.history]


def gang(work: Callable[..., Any], world: int, *args: Any) -> list[Ended]:
    """Run ``work(rank, world, *args)`` in ``world`` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The server forks with the environment that it was started in, not with the present one.
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = [_SERVER.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        _SERVER.Process(target=_rank, args=(work, rank, world, environment, pipes[rank][1], args), daemon=True)
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for _, sender in pipes:
        sender.close()
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    return [_ended(rank, receiver, deadline) for rank, (receiver, _) in zip(ranks, pipes, strict=True)]


def _ended(rank: BaseProcess, receiver: Any, deadline: float) -> Ended:
    said = Ended(error="Silent")
    with contextlib.suppress(EOFError):
        if receiver.poll(max(0.0, deadline - time.monotonic())):
            said = receiver.recv()
    rank.join(max(1.0, deadline - time.monotonic()))
    if rank.is_alive():
        rank.kill()
        rank.join()
        return Ended(error="Hung", message=f"no end after {_TIMEOUT_SECONDS} s")
    return replace(said, exit_code=rank.exitcode)


def _rank(
    work: Callable[..., Any],
    rank: int,
    world: int,
    environment: dict[str, str],
    sender: Any,
    args: tuple[Any, ...],
) -> None:
    os.environ |= environment
    import torch

    torch.set_num_threads(1)
    try:
        ended = Ended(value=work(rank, world, *args))
    except Exception as error:
        with contextlib.suppress(OSError):  # a file too
            traceback.print_exc()
        ended = Ended(error=type(error).__name__, message=str(error))
    sender.send_bytes(pickle.dumps(ended))
    os._exit(0)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a rank that reached the end knows."""

    history: list[dict[str, Any]]
    first_step: int
    metrics: dict[str, float]
    message: str


class Synthetic:
    """Tokens that can be predicted in part: each follows from the one before it, or is random."""

    num_samples = 4096

    def __init__(self, run: Run, *, offset: int = 0, at: Callable[[int], None] = lambda index: None) -> None:
        self._run, self._offset, self._at = run, offset, at

    def sample(self, index: int) -> np.ndarray:
        self._at(index)
        rng = np.random.default_rng((self._run.seed, self._offset, index))
        tokens = rng.integers(0, self._run.vocab_size, self._run.length + 1)
        for i in range(1, self._run.length + 1):
            if tokens[i] % 4:
                tokens[i] = (tokens[i - 1] * 3 + 1) % self._run.vocab_size
        return tokens


def resolved(run: Run, layout: dict[str, int]) -> ResolvedStage:
    """The stage that a run is."""
    world = layout["tensor"] * layout["pipeline"] * layout["data"]
    shape = {"layers": 4, "hiddenSize": 64, "heads": 4, "kvHeads": 2, "ffnHiddenSize": 96}
    pretrain = {
        "from": {"shards": "shards"},
        "model": {**shape, **run.model},
        "tokens": run.steps * BATCH * run.length,
        "sequenceLength": run.length,
        "globalBatchSize": BATCH,
        "microBatchSize": 2,
        "precision": run.precision,
        "parallelism": {"tensor": layout["tensor"], "pipeline": layout["pipeline"]},
        "schedule": {"learningRate": run.learning_rate, "warmup": 2},
        "checkpoint": {"every": run.every},
        "validation": {"every": 10, "samples": 5},
    }
    pretrain |= run.overrides
    return ResolvedStage.model_validate(
        {
            "run": "test",
            "stage": {"name": "pretrain", "compute": {"ranksPerNode": world}, "pretrain": pretrain},
            "attempt": run.attempt,
            "seed": run.seed,
            "hash": "a" * 64,
            "inputs": {"shards": {"uri": str(run.folder), "digest": run.shards_digest, "kind": "shards"}},
            "storage": {"uri": str(run.folder / "storage")},
            "outputUri": str(run.folder / "storage" / "pretrain"),
        }
    )


def train_rank(rank: int, world: int, run: Run, layout: dict[str, int]) -> Trained:
    """One rank of the pretrain loop, from the newest checkpoint to the end."""
    from headrace_trainer.stages.pretrain.stage import final_metrics, leave_model

    def to_the_end(loop: Any, ctx: Any, card: Any) -> Trained:
        loop.resume()
        first_step = loop.step
        (run.folder / f"began-{run.attempt:02d}").write_text(str(first_step))
        loop.run()
        leave_model(ctx.output, loop, card)
        return Trained(
            history=loop.history.records,
            first_step=first_step,
            metrics=final_metrics(loop, card),
            message=loop.message,
        )

    return joined(rank, world, run, layout, to_the_end)


def joined(rank: int, world: int, run: Run, layout: dict[str, int], work: Callable[[Any, Any, Any], Any]) -> Any:
    """``work(loop, context, card)`` on a rank that has joined its gang, before the first step."""
    from headrace_trainer.engine import assembly
    from headrace_trainer.engine.optimizer import wrap_model
    from headrace_trainer.engine.parallel import join_gang
    from headrace_trainer.formats.model_card import describe
    from headrace_trainer.stage import StageContext
    from headrace_trainer.stages.pretrain.stage import build_loop
    from headrace_trainer.stages.pretrain.stage import layout as check_layout

    assembly.wrap_model = partial(wrap_model, bucket_size=run.bucket_size)  # type: ignore[attr-defined]
    stage = resolved(run, layout)
    config = stage.stage.pretrain
    assert config is not None
    own = f"-node{rank}" if run.nodes else ""
    scratch = run.folder / f"scratch-{run.attempt}{own}"
    local_rank, local_world = (0, 1) if run.nodes else (rank, world)
    ctx = StageContext(resolved=stage, scratch=scratch, rank=rank, world=world, local_rank=local_rank)
    axes = check_layout(config.parallelism, num_ranks=world)
    card = describe(
        config.model.architecture,
        vocab_size=run.vocab_size,
        eod_id=0,
        sequence_length=run.length,
        precision=config.precision,
    )
    training = Synthetic(run, at=_trouble(run, ctx, is_last=rank == world - 1, loop_of=lambda: loop))
    with join_gang(axes, rank=rank, local_rank=local_rank, local_world=local_world, seed=run.seed) as ranks:
        loop = build_loop(ctx, ranks, card, training=training, validation=Synthetic(run, offset=1))
        if rank == 0:
            _trouble_in_storage(run, ctx.store)
        if ranks.data_rank == axes.data - 1:
            loop.training = replace(loop.training, objective=_NotANumber(run, loop))
        return work(loop, ctx, card)


class _NotANumber:
    """Collates as the objective of a loop does, but for the batches of bad steps, whose losses are NaN."""

    def __init__(self, run: Run, loop: Any) -> None:
        self._run, self._loop, self._objective = run, loop, loop.training.objective

    def collate(self, *args: Any) -> Any:
        batch = self._objective.collate(*args)
        return replace(batch, mask_BT=batch.mask_BT * math.nan) if self._loop.step in self._run.bad_steps else batch


def _trouble(run: Run, ctx: Any, *, is_last: bool, loop_of: Callable[[], Any]) -> Callable[[int], None]:
    def at(index: int) -> None:
        if run.die_at is not None:
            # So that the step of a commit does not depend on how busy the machine is.
            saves = loop_of().checkpointer
            _wait(lambda: saves.ready or not saves.is_saving)
        if is_last and run.die_at is not None and index >= run.die_at * BATCH:
            begun = loop_of()._saved_step
            if saves.is_saving and begun < loop_of().step:  # every rank has written, and the first one commits
                _wait(lambda: any(run.folder.rglob(f"step-{begun:08d}-a{run.attempt}/checkpoint.json")))
            os.kill(os.getpid(), signal.SIGKILL)
        if is_last and run.stop_at is not None and index >= run.stop_at * BATCH:
            (ctx.scratch / "stop").touch()
        if run.held is not None and index >= run.released_at * BATCH:
            (run.folder / "released").touch()
        elif run.held is not None and run.slow_while_held:
            time.sleep(0.05)
            begun = len([p for p in (ctx.scratch / "checkpoints").glob("step-*") if p.is_dir()])
            (run.folder / "on-their-way").write_text(str(begun))
        if is_last and run.full_at is not None and index >= run.full_at * BATCH:
            has_room = run.room_at is not None and index >= run.room_at * BATCH
            _limit_files(None if has_room else 20_000)
        if run.first_is_full and ctx.rank == 0:
            _limit_files(4000)

    return at


def _limit_files(size: int | None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not until():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


def _trouble_in_storage(run: Run, store: Any) -> None:
    rank = os.getpid()

    def kill(pid: int) -> None:
        (run.folder / "writer").write_text(str(os.getpid()))
        os.kill(pid, signal.SIGKILL)
        time.sleep(60)  # the fork of a rank that is dead dies too

    def wrapped(put: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
        def put_in_trouble(key: str, content: Any) -> None:
            while run.held is not None and key.endswith(run.held) and not (run.folder / "released").exists():
                time.sleep(0.05)
            if run.die_before is not None and key.endswith(run.die_before):
                kill(rank)
            if run.writer_dies_before is not None and key.endswith(run.writer_dies_before):
                kill(os.getpid())
            put(key, content)
            if run.die_after is not None and key.endswith(run.die_after):
                kill(rank)

        return put_in_trouble

    store.put_file, store.put_bytes = wrapped(store.put_file), wrapped(store.put_bytes)
