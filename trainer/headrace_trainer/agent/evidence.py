"""Evidence of a hang: every rank's stacks, heartbeats and processes, and NCCL's flight records.

In: the ranks, before they are killed. Out: files in the scratch folder, and in storage under
``<stage>/evidence/attempt-<n>/pod-<i>/``. Nothing here fails a restart or delays it by more than about 25 s.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil

from headrace_api.contract import ResolvedStage, join_uri
from headrace_trainer.agent.watch import Late
from headrace_trainer.processes import tree
from headrace_trainer.stage import EVIDENCE, STACK_SIGNAL, stacks_file
from headrace_trainer.storage import ObjectStore

_STACKS_SECONDS = 10.0
_ANSWER_SECONDS = 2.0
_NCCL_SECONDS = 3.0
_UPLOAD_SECONDS = 10.0
_TEXT_BYTES = 1 << 20
_NCCL_BYTES = 4 << 20
_NCCL_FILES = 16
_KEPT_ATTEMPTS = 5

log = logging.getLogger("headrace.agent")


def read_stacks(pids: Mapping[int, int], scratch: Path, *, first: int) -> dict[int, str]:
    """Every rank's Python stacks; empty for a rank that neither py-spy nor the rank itself could dump.

    Args:
        pids: rank -> process id.
        scratch: the pod's scratch folder.
        first: number of the pod's first rank.
    """
    stacks = _look_from_outside(pids)
    silent = {rank: pid for rank, pid in pids.items() if not stacks[rank]}
    if silent:
        stacks |= _ask(silent, scratch, first=first)
    return stacks


def waits_in_collective(stacks: str) -> bool | None:
    """Whether a rank's main thread is in torch.distributed; None without a stack."""
    if not stacks:
        return None
    main = stacks.partition('"MainThread"')[2].partition("\nThread ")[0]
    return "distributed_c10d" in (main or stacks)


def _look_from_outside(pids: Mapping[int, int]) -> dict[int, str]:
    """Dump stacks with py-spy, which also reads stopped processes. The kernel may deny it, as in hardened pods."""
    program = shutil.which(
        "py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if program is None:
        return dict.fromkeys(pids, "")
    looks = {
        rank: subprocess.Popen(
            [program, "dump", "--nonblocking", "--pid", str(pid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank, pid in pids.items()
    }
    deadline = time.monotonic() + _STACKS_SECONDS
    return {rank: _output(look, deadline=deadline) for rank, look in looks.items()}


def _output(look: "subprocess.Popen[str]", *, deadline: float) -> str:
    try:
        text, _ = look.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        look.kill()
        look.communicate()
        return ""
    return text if look.returncode == 0 else ""


def _ask(pids: Mapping[int, int], scratch: Path, *, first: int) -> dict[int, str]:
    """Send each rank a signal that makes it dump its stacks, unless it is stopped."""
    files = {rank: stacks_file(scratch, rank - first) for rank in pids}
    for rank, pid in pids.items():
        if files[rank].exists():  # otherwise no handler is installed yet, and the signal would kill the rank
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, STACK_SIGNAL)
    _wait(lambda: all(_text(file) for file in files.values()), seconds=_ANSWER_SECONDS)
    return {rank: _text(file) for rank, file in files.items()}


def describe_processes(pids: Mapping[int, int]) -> str:
    """Each rank's state according to the kernel, and its child processes."""
    lines = []
    for rank, pid in pids.items():
        lines.append(f"rank {rank}, process {pid}")
        for name in ("status", "wchan", "stack"):
            lines += [f"{name}:", _text(Path(f"/proc/{pid}/{name}")).rstrip()]
        lines += [f"below it: {_describe(child)}" for child in tree(pid)]
        lines.append("")
    return "\n".join(lines)


def _describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error), process.oneshot():
        return f"{process.pid} (parent {process.ppid()}) {process.status()} {' '.join(process.cmdline())[:200]}"
    return f"{process.pid}, which has exited"


def heartbeats(ranks: Sequence[Late], pids: Mapping[int, int], progress: Mapping[int, str | None]) -> str:
    """The latest heartbeats as JSON."""
    entries = [
        {**asdict(late), "pid": pids.get(late.rank), "progress": json.loads(progress.get(late.rank) or "null")}
        for late in ranks
    ]
    return json.dumps(entries, indent=1)


def read_flight_records(scratch: Path, ranks: Sequence[int]) -> dict[str, bytes]:
    """NCCL's flight records, requested through each rank's pipe, where there is one."""
    folder, asked = scratch / EVIDENCE, False
    for pipe in (scratch / f"nccl-pipe-{rank}.pipe" for rank in ranks):
        with contextlib.suppress(OSError):  # no rank has the pipe open
            fd = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            os.write(fd, b"1")
            os.close(fd)
            asked = True
    if asked:
        _wait(lambda: len(list(folder.glob("nccl-*"))) >= len(ranks), seconds=_NCCL_SECONDS)
    found = sorted(folder.glob("nccl-*"))[:_NCCL_FILES] if folder.is_dir() else []
    return {file.name: file.read_bytes()[:_NCCL_BYTES] for file in found}


def keep(files: Mapping[str, bytes], folder: Path) -> None:
    """Write evidence to this node's disk, if there is room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        log.warning("failed to save evidence in %s: %s", folder, error)


def shorten(text: str) -> bytes:
    """Encode a text, truncated to the limit for one evidence file."""
    return text.encode()[:_TEXT_BYTES]


def upload(
    files: Mapping[str, bytes], resolved: ResolvedStage, *, index: int, open_store: Callable[[], ObjectStore]
) -> str | None:
    """Upload evidence, and delete that of all but the newest attempts.

    Returns:
        Where it is; None if the upload failed or took too long. A slow upload is abandoned.
    """
    root, done = f"{resolved.stage.name}/{EVIDENCE}", threading.Event()
    key = f"{root}/attempt-{resolved.attempt}/pod-{index}"

    def store_all() -> None:
        try:
            store = open_store()
            for name, data in files.items():
                store.put_bytes(f"{key}/{name}", data)
            done.set()
            _prune(store, root)
        except Exception as error:  # nothing here may change how the attempt ends
            log.warning("failed to upload evidence: %s", error)

    thread = threading.Thread(target=store_all, daemon=True)
    thread.start()
    deadline = time.monotonic() + _UPLOAD_SECONDS
    while thread.is_alive() and not done.wait(0.05) and time.monotonic() < deadline:
        pass
    return join_uri(resolved.storage.uri or "", key) if done.is_set() else None


def _prune(store: ObjectStore, root: str) -> None:
    names = {info.key.removeprefix(f"{root}/").partition("/")[0] for info in store.list(f"{root}/")}
    attempts = sorted((n for n in names if n.startswith("attempt-")), key=lambda n: int(n.removeprefix("attempt-")))
    for name in attempts[:-_KEPT_ATTEMPTS]:
        store.delete(f"{root}/{name}/")


def _wait(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
