"""What a checkpoint costs the training that makes it, and what a resume reads: ``python -m benchmarks.checkpoint``.

Saves. The same model with the same optimizer state is saved in five ways, in turns, while it trains: by
``engine.checkpoint`` in the background as the loop does it, by the same code while training waits, and by Megatron-core's
own ``dist_checkpointing`` with its forking ``AsyncCallsQueue``: in the ``fully_reshardable`` form, in the background and
while training waits, and in the ``dp_reshardable`` form, which no other layout reads. A save's stall is all the time that
it costs the training: the call that begins it, and what each step until it is committed takes longer than the median of the
steps before and after. Ours also hashes the files, copies them to storage and commits a manifest there; Megatron's are written
where they stay, and are done then.

Resumes. A state is saved under one layout and loaded under the same or another by ranks with a node each, from a directory
that is read as a bucket is; what each node fetched, beside the size of the checkpoint.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch

from benchmarks.training import ONE_RANK, Training, opened
from headrace_api.model import Architecture
from headrace_api.parallelism import Layout
from headrace_api.stages.training import Checkpointing, Precision
from headrace_trainer.engine.loop import Loop
from headrace_trainer.formats.model_card import HISTORY_FILE
from headrace_trainer.storage import DirectoryStore

RESULTS = Path(__file__).parent / "results"
LIMIT = 0.02
"""A save in the background may stall training for this part of the interval between saves."""
DEFAULT_EVERY = Checkpointing().every
QUIET_STEPS = 3
"""Steps before a save, and after it, that say how long a step is without one."""

ARCHITECTURES = {
    "30M": (Architecture(layers=8, hidden_size=512, heads=8, kv_heads=8, ffn_hidden_size=1152), 8000),
    "120M": (Architecture(layers=12, hidden_size=768, heads=12, kv_heads=12, ffn_hidden_size=2048), 23_000),
}
LAYOUTS = {
    "1 rank": ONE_RANK,
    "DP2": Layout(tensor=1, pipeline=1, data=2),
    "TP2": Layout(tensor=2, pipeline=1, data=1),
    "PP2": Layout(tensor=1, pipeline=2, data=1),
}
SAVED_AS = ("1 rank", "DP2")
RESUMES = [("PP2", "PP2"), ("DP2", "DP2"), ("TP2", "TP2"), ("1 rank", "PP2"), ("PP2", "DP2")]


def training(model: str, layout: str, *, global_batch: int | None = None) -> Training:
    """Short steps: the shorter a step, the more a save weighs. A sample a replica unless ``global_batch`` is set."""
    architecture, vocab_size = ARCHITECTURES[model]
    return Training(
        architecture=architecture,
        vocab_size=vocab_size,
        length=16,
        global_batch=global_batch or LAYOUTS[layout].data,
        micro_batch=1,
        steps=10**6,
        precision=Precision.FP32,
        layout=LAYOUTS[layout],
    )


class Way(Protocol):
    """One way of saving the state of a loop."""

    @property
    def is_saving(self) -> bool:
        """Whether a save is on its way; the same on every rank."""

    def begin(self) -> None:
        """Save, or begin to."""

    def poll(self) -> None:
        """After a step: end what is on its way if it can be ended."""

    def measure(self) -> int:
        """Bytes of the newest checkpoint; whatever it left is removed."""


class Ours:
    """``engine.checkpoint``.

    Args:
        loop: what is saved; its steps also take the save further.
        folder: its storage.
        waits: whether training waits for the commit.
    """

    def __init__(self, loop: Loop, folder: Path, *, waits: bool) -> None:
        self._loop, self._folder, self._waits = loop, folder, waits

    @property
    def is_saving(self) -> bool:
        return self._loop.checkpointer.is_saving

    def begin(self) -> None:
        loop = self._loop
        loop.stepper.gather_weights()
        loop.checkpointer.save(
            step=loop.step,
            consumed_samples=loop.consumed_samples,
            extras=lambda: {HISTORY_FILE: loop.history.dumps()},
        )
        if self._waits:
            loop.checkpointer.finish()

    def poll(self) -> None:
        """The loop's steps do it."""

    def measure(self) -> int:
        newest = max(self._folder.rglob("checkpoint.json"), key=lambda path: path.stat().st_mtime).parent
        return sum(file.stat().st_size for file in newest.iterdir())


class Megatrons:
    """Megatron-core's ``dist_checkpointing``, as its own training script calls it.

    Args:
        loop: what is saved.
        folder: where to.
        form: of the optimizer's state.
        waits: whether training waits until it is written.
    """

    def __init__(self, loop: Loop, folder: Path, *, form: str, waits: bool) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        from headrace_trainer.engine.device import megatron as m

        self._loop, self._folder, self._form, self._waits, self._m = loop, folder, form, waits, m
        self._queue = AsyncCallsQueue()
        self._replicas = m.parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._strategy = m.FullyParallelSaveStrategyWrapper(
            m.TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1, cached_metadata=True), self._replicas, True
        )
        self._is_first = True

    @property
    def is_saving(self) -> bool:
        return bool(self._queue.get_num_unfinalized_calls())

    def begin(self) -> None:
        content = {
            "distrib_optim_sharding_type": self._form,
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
        }
        metadata = {**content, "dp_cp_group": self._replicas}
        state = self._loop.state
        self._loop.stepper.gather_weights()
        self._folder.mkdir(parents=True, exist_ok=True)
        with _as_it_comes():
            model = state.model.sharded_state_dict(metadata=metadata)
            optimizer = state.optimizer.sharded_state_dict(model, is_loading=False, metadata=metadata)
            request = self._m.dist_checkpointing.save(
                {"model": model, "optimizer": optimizer},
                str(self._folder),
                self._strategy,
                content_metadata=content,
                async_sharded_save=True,
                validate_access_integrity=self._is_first,
            )
            self._is_first = False
            if self._waits:
                request.execute_sync()
            else:
                self._queue.schedule_async_request(request)

    def poll(self) -> None:
        self._queue.maybe_finalize_async_calls(blocking=False)

    def measure(self) -> int:
        size = sum(file.stat().st_size for file in self._folder.iterdir())
        self._loop.gang.barrier()
        if self._loop.gang.is_first:
            shutil.rmtree(self._folder)
        self._loop.gang.barrier()
        return size


_as_installed: Any = None


@contextlib.contextmanager
def _as_it_comes() -> Iterator[None]:
    """Megatron's writer without this repository's patches to it."""
    global _as_installed
    from megatron.core.dist_checkpointing.strategies import torch as torch_dist

    if _as_installed is None:
        spec = importlib.util.find_spec("megatron.core.dist_checkpointing.strategies.filesystem_async")
        assert spec is not None and spec.loader is not None
        _as_installed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_as_installed)
        # The original is made by a process that imports everything again, once in a training.
        results = multiprocessing.get_context("fork").Manager().Queue()
        _as_installed._get_write_results_queue = lambda: results
    ours, torch_dist.FileSystemWriterAsync = torch_dist.FileSystemWriterAsync, _as_installed.FileSystemWriterAsync
    try:
        yield
    finally:
        torch_dist.FileSystemWriterAsync = ours


WAYS: dict[str, Callable[[Loop, Path], Way]] = {
    "headrace": lambda loop, folder: Ours(loop, folder / "storage", waits=False),
    "headrace, waiting": lambda loop, folder: Ours(loop, folder / "storage", waits=True),
    "fully_reshardable": lambda loop, folder: Megatrons(
        loop, folder / "megatron-full", form="fully_reshardable", waits=False
    ),
    "fully_reshardable, waiting": lambda loop, folder: Megatrons(
        loop, folder / "megatron-wait", form="fully_reshardable", waits=True
    ),
    "dp_reshardable": lambda loop, folder: Megatrons(loop, folder / "megatron-dp", form="dp_reshardable", waits=False),
}


@dataclass(frozen=True, kw_only=True)
class Save:
    """What one save took, on rank 0."""

    step_seconds: float
    """Median of the steps around it."""
    begin_seconds: float
    """The call alone."""
    stall_seconds: float
    stall_cpu_seconds: float
    """The same in the rank's own user and system time, of which a busy machine takes nothing away."""
    commit_seconds: float
    """From the call until the training knows that the checkpoint is there."""
    bytes: int


def take(way: Way, loop: Loop) -> Save:
    """Save once, with steps before and after. Every rank calls."""

    def step() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        loop.advance()
        way.poll()
        return time.perf_counter() - wall, time.process_time() - cpu

    quiet = [step() for _ in range(QUIET_STEPS)]
    loop.gang.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    way.begin()
    begin, begin_cpu = time.perf_counter() - wall, time.process_time() - cpu
    is_done = not way.is_saving
    disturbed = [step()]  # what a fork left for later is paid at the first writing to a page
    while way.is_saving:
        disturbed.append(step())
    commit = begin if is_done else time.perf_counter() - wall
    quiet += [step() for _ in range(QUIET_STEPS)]
    plain, plain_cpu = (statistics.median(column) for column in zip(*quiet, strict=True))
    return Save(
        step_seconds=plain,
        begin_seconds=begin,
        stall_seconds=begin + sum(seconds - plain for seconds, _ in disturbed),
        stall_cpu_seconds=begin_cpu + sum(seconds - plain_cpu for _, seconds in disturbed),
        commit_seconds=commit,
        bytes=way.measure(),
    )


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Medians of one way's saves, with quartiles of the stall."""

    saves: int
    step_seconds: float
    begin_seconds: float
    stall_seconds: float
    stall_quartiles: tuple[float, float]
    stall_cpu_seconds: float
    commit_seconds: float
    bytes: int
    extra_bytes: int
    """Peak memory of all processes beyond what they had before, in a save of its own."""

    @property
    def interval_seconds(self) -> float:
        """Between saves at the default cadence, with these steps."""
        assert isinstance(DEFAULT_EVERY, int)
        return DEFAULT_EVERY * self.step_seconds

    @property
    def share(self) -> float:
        """The stall's part of that interval."""
        return self.stall_seconds / self.interval_seconds

    @property
    def shortest_interval_seconds(self) -> float:
        """Between saves where the stall is just what it may be."""
        return self.stall_seconds / LIMIT


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model under a layout."""

    model: str
    layout: str
    ways: tuple[str, ...]
    rounds: int
    """Saves of each way that are timed; one comes before them, and one after whose memory is measured."""


def time_saves(case: Case, rank: int, folder: Path, watching: Any) -> dict[str, list[Save]] | None:
    """All ways in turns, on one rank; rank 0 has the figures."""
    with opened(training(case.model, case.layout), folder, rank=rank) as loop:
        ways = {name: WAYS[name](loop, folder) for name in case.ways}
        for way in ways.values():
            take(way, loop)
        found = {name: [] for name in ways}
        for i in range(case.rounds):
            names = list(ways)[i % len(ways) :] + list(ways)[: i % len(ways)]
            for name in names:
                found[name].append(take(ways[name], loop))
        for index, way in enumerate(ways.values()):
            loop.gang.barrier()
            watching.value = index
            take(way, loop)
            loop.gang.barrier()
            watching.value = -1
    return found if rank == 0 else None


class Watch(threading.Thread):
    """Peak memory of the processes below this one, for each value of a shared number but -1.

    What processes share counts once. The number that is there first is the first way's, and so on.
    """

    def __init__(self, watching: Any) -> None:
        super().__init__(daemon=True)
        self._watching, self._ended = watching, threading.Event()
        self.seen: dict[int, list[int]] = {}

    def run(self) -> None:
        while not self._ended.wait(0.05):
            if (index := self._watching.value) >= 0:
                self.seen.setdefault(index, []).append(self._used())

    def end(self) -> dict[int, int]:
        """Most bytes beyond those of the first look, by number."""
        self._ended.set()
        self.join()
        return {index: max(sizes) - sizes[0] for index, sizes in self.seen.items()}

    def _used(self) -> int:
        used = 0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError):
                used += process.memory_full_info().pss
        return used


class FarStore(DirectoryStore):
    """A directory that is read as a bucket is: file by file, into a folder of the node.

    Attributes:
        fetched: bytes that this process has fetched from checkpoints.
    """

    fetched = 0

    def get_file(self, key: str, path: Path) -> None:
        super().get_file(key, path)
        self.fetched += path.stat().st_size

    def local_path(self, key: str) -> Path | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Resume:
    """What the nodes of a gang fetched to go on."""

    model: str
    saved_as: str
    loaded_as: str
    bytes: int
    """Of the checkpoint."""
    fetched: tuple[int, ...]
    """By node."""


def save_or_resume(model: str, layout: str, attempt: int, rank: int, folder: Path, _watching: Any) -> list[int] | None:
    """Go on from what is in ``folder``, take two steps and save; what each node fetched, on rank 0."""
    store = FarStore(folder / "storage")
    # The batch is part of what a checkpoint belongs to, the layout is not.
    same = training(model, layout, global_batch=2)
    with opened(same, folder, rank=rank, attempt=attempt, own_node=True, store=store) as loop:
        assert (loop.step > 0) == (attempt > 1)
        fetched = loop.gang.gather(store.fetched)
        if attempt == 1:
            loop.advance()
            loop.advance()
            Ours(loop, folder / "storage", waits=True).begin()
    return fetched if rank == 0 else None


def compare_resume(model: str, saved_as: str, loaded_as: str) -> Resume:
    """Save under one layout and load under another, with fresh processes each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_gang(save_or_resume, LAYOUTS[saved_as].world, folder, model, saved_as, 1)
        size = sum(f.stat().st_size for f in next((folder / "storage").rglob("step-*")).iterdir())
        fetched, _ = in_gang(save_or_resume, LAYOUTS[loaded_as].world, folder, model, loaded_as, 2)
    return Resume(model=model, saved_as=saved_as, loaded_as=loaded_as, bytes=size, fetched=tuple(fetched))


def compare_saves(case: Case) -> dict[str, Figures]:
    """Time a case in fresh processes."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("HEADRACE_BENCHMARK_FOLDER")) as folder:
        saves, memory = in_gang(time_saves, LAYOUTS[case.layout].world, Path(folder), case)
    return {name: summarize(saves[name], extra_bytes=memory.get(i, 0)) for i, name in enumerate(case.ways)}


def summarize(saves: list[Save], *, extra_bytes: int) -> Figures:
    """Medians."""
    stalls = [save.stall_seconds for save in saves]
    first, _, third = statistics.quantiles(stalls, n=4) if len(stalls) > 1 else (stalls[0],) * 3
    return Figures(
        saves=len(saves),
        step_seconds=statistics.median(save.step_seconds for save in saves),
        begin_seconds=statistics.median(save.begin_seconds for save in saves),
        stall_seconds=statistics.median(stalls),
        stall_quartiles=(first, third),
        stall_cpu_seconds=statistics.median(save.stall_cpu_seconds for save in saves),
        commit_seconds=statistics.median(save.commit_seconds for save in saves),
        bytes=saves[-1].bytes,
        extra_bytes=extra_bytes,
    )


def _rank(work: Callable[..., Any], args: Any, rank: int, folder: Path, port: int, watching: Any, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if (found := work(*args, rank, folder, watching)) is not None:
        results.put(found)


def in_gang(work: Callable[..., Any], world: int, folder: Path, *args: Any) -> tuple[Any, dict[int, int]]:
    """Run ``work(*args, rank, folder, watching)`` on every rank; what rank 0 returned, and peaks of memory.

    Raises:
        RuntimeError: a rank failed.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results, watching = context.SimpleQueue(), context.Value("i", -1)
    ranks = [
        context.Process(target=_rank, args=(work, args, rank, folder, port, watching, results)) for rank in range(world)
    ]
    watch = Watch(watching)
    watch.start()
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    memory = watch.end()
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"{args}: ranks ended with {[process.exitcode for process in ranks]}")
    return results.get(), memory


def save_table(case: Case, figures: dict[str, Figures]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{case.model}, {case.layout}: {case.rounds} saves of each way",
        "",
        f"| way | begin s | stall s (quartiles) | stall CPU s | of {DEFAULT_EVERY} steps | {LIMIT:.0%} at | commit s | MB | extra MB |",
        "|" + "---|" * 9,
    ]
    for name, f in figures.items():
        low, high = f.stall_quartiles
        columns = [
            name,
            f"{f.begin_seconds:.3f}",
            f"{f.stall_seconds:.2f} ({low:.2f} to {high:.2f})",
            f"{f.stall_cpu_seconds:.2f}",
            f"{f.share:.2%} of {f.interval_seconds:.0f} s",
            f"{f.shortest_interval_seconds:.0f} s",
            f"{f.commit_seconds:.1f}",
            f"{f.bytes / 1e6:.0f}",
            f"{f.extra_bytes / 1e6:.0f}",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def resume_table(resumes: list[Resume]) -> str:
    """The figures as Markdown."""
    lines = ["| model | saved as | loaded as | checkpoint MB | fetched MB, by node | of it |", "|" + "---|" * 6]
    for r in resumes:
        fetched, parts = [f"{n / 1e6:.0f}" for n in r.fetched], [f"{n / r.bytes:.0%}" for n in r.fetched]
        columns = [r.model, r.saved_as, r.loaded_as, f"{r.bytes / 1e6:.0f}", ", ".join(fetched), ", ".join(parts)]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print tables, write JSON; 1 where a save in the background stalls training for longer than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=ARCHITECTURES, action="append", help="all if left out")
    parser.add_argument("--layout", choices=SAVED_AS, action="append", help="both if left out")
    parser.add_argument("--way", choices=WAYS, action="append", help="all if left out")
    parser.add_argument("--rounds", type=int, default=6, help="saves of each way")
    parser.add_argument("--only", choices=("saves", "resumes"))
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint.json")
    args = parser.parse_args()
    measured: list[tuple[Case, dict[str, Figures]]] = []
    resumes: list[Resume] = []
    if args.only != "resumes":
        for model in args.model or ARCHITECTURES:
            for layout in args.layout or SAVED_AS:
                case = Case(model=model, layout=layout, ways=tuple(args.way or WAYS), rounds=args.rounds)
                measured.append((case, compare_saves(case)))
                print(save_table(*measured[-1]), flush=True)
                write(args.out, measured, resumes)
    if args.only != "saves":
        for saved_as, loaded_as in RESUMES:
            resumes.append(compare_resume((args.model or ["30M"])[0], saved_as, loaded_as))
            print(resume_table(resumes[-1:]), flush=True)
            write(args.out, measured, resumes)
    print(f"\nwritten to {args.out}")
    return int(any(f.share > LIMIT for _, figures in measured for name, f in figures.items() if name == "headrace"))


def write(path: Path, measured: list[tuple[Case, dict[str, Figures]]], resumes: list[Resume]) -> None:
    """Write what is known so far: on a busy machine the rest may take long."""
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.checkpoint", *sys.argv[1:]]),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[1],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "limit": LIMIT,
        "default_every_steps": DEFAULT_EVERY,
        "saves": [
            {"model": case.model, "layout": case.layout, "way": name, **asdict(f), "share_of_interval": f.share}
            for case, figures in measured
            for name, f in figures.items()
        ],
        "resumes": [asdict(r) for r in resumes],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
