"""Whether this machine can run a manifest, checked before anything starts.

``check`` compares the run with a ``Machine`` and with the files that exist. What cannot work is an error and ends
``headrace run`` at once; ``headrace validate`` only warns about it, because a cluster may be able to do it.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

from headrace_api.people import people_bytes
from headrace_api.plain_yaml import dotted
from headrace_api.planning.fit import least_estimate, too_large
from headrace_api.run import Stage, TrainingRun
from headrace_api.stages.training import Precision
from headrace_api.words import line

_SMI = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_SMI_SECONDS = 20
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")
_ELSEWHERE = "a cluster may have more"


class Severity(StrEnum):
    """Whether the run can be tried here."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that this machine cannot do, or hardly."""

    severity: Severity
    text: str
    """Field, value and remedy."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine's resources."""

    memory: int
    """Bytes of main memory, or the container's limit."""
    gpu_memory: tuple[int, ...] = ()
    """Bytes of memory of each GPU."""


def this_machine() -> Machine:
    """This machine's resources, according to the kernel and nvidia-smi."""
    memory = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or its limit is "max"
        memory = min(memory, int(_CGROUP_MEMORY.read_text()))
    return Machine(memory=memory, gpu_memory=_gpus())


def _gpus() -> tuple[int, ...]:
    try:
        done = subprocess.run(_SMI, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
        found = tuple(int(mebibytes) * 2**20 for mebibytes in done.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return found[: sum(1 for device in visible.split(",") if device.strip() not in ("", "-1"))]


def check(run: TrainingRun, machine: Machine, *, stages: Collection[str]) -> list[Finding]:
    """What this machine cannot do of a run.

    Args:
        run: the run, with absolute paths and a storage.
        machine: the machine's resources.
        stages: the stages that would run; finished ones need nothing.
    """
    findings = list(_storage(run))
    for i, stage in enumerate(run.spec.stages):
        if stage.name in stages:
            field = f"spec.stages[{i}]"
            findings += [
                *_sources(field, stage),
                *_gpu_count(field, stage, machine),
                *_memory(field, run, stage, machine),
            ]
    return findings


def _error(field: str, value: object, remedy: str) -> Finding:
    return Finding(severity=Severity.ERROR, text=line(field, value, remedy))


def _warning(field: str, value: object, remedy: str) -> Finding:
    return Finding(severity=Severity.WARNING, text=line(field, value, remedy))


def _local_path(uri: str) -> Path | None:
    """The local path that a URI refers to; None for a bucket."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return Path(uri)
    return Path(rest) if scheme == "file" else None


def _storage(run: TrainingRun) -> Iterator[Finding]:
    assert run.spec.storage.uri is not None, "localize() sets storage.uri"
    folder = _local_path(run.spec.storage.uri)
    if folder is None:
        return
    above = next(p for p in (folder, *folder.parents) if p.exists())
    if not above.is_dir():
        yield _error("spec.storage.uri", str(folder), f"{above} is a file; name a folder")
    elif not os.access(above, os.W_OK | os.X_OK):
        yield _error("spec.storage.uri", str(folder), f"{above} is not writable; name another folder")


def _sources(field: str, stage: Stage) -> Iterator[Finding]:
    for where, uri in stage.config.addresses():
        path = _local_path(uri)
        if path is not None and not path.exists() and not _fixed_part(path).is_dir():
            yield _error(dotted((field, stage.kind, *where)), uri, "no such file or folder; check the path")


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first part of a path that has a wildcard; the path itself where none has."""
    parts = pattern.parts
    first = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts))
    return Path(*parts[:first])


def _gpu_count(field: str, stage: Stage, machine: Machine) -> Iterator[Finding]:
    compute, there = stage.compute, len(machine.gpu_memory)
    wanted = compute.nodes * compute.gpus_per_node
    if wanted <= there:
        return
    if stage.training is not None and stage.training.precision is Precision.FP8 and there == 0:
        yield _error(f"{field}.{stage.kind}.precision", "fp8", "this machine has no GPU; use bf16 or fp32 here")
    elif there == 0:
        ranks = f"its {compute.world} ranks share the CPU" if compute.world > 1 else "it runs on the CPU"
        yield _warning(f"{field}.compute.gpusPerNode", compute.gpus_per_node, f"this machine has no GPU; {ranks}")
    else:
        has = f"this machine has {there} of the {wanted} GPUs; ask for fewer: {_ELSEWHERE}"
        yield _error(f"{field}.compute.gpusPerNode", compute.gpus_per_node, has)


def _memory(field: str, run: TrainingRun, stage: Stage, machine: Machine) -> Iterator[Finding]:
    """Compare the state and activations of all ranks with this machine's memory, or of one rank with a GPU's."""
    on_gpus = bool(machine.gpu_memory) and stage.compute.gpus_per_node > 0
    estimate = least_estimate(run, stage, on_gpus=on_gpus)
    if estimate is None:
        return
    sharing, memory = (1, min(machine.gpu_memory)) if on_gpus else (stage.compute.world, machine.memory)
    state, activations = estimate.state_bytes_per_rank, estimate.activation_bytes_per_rank
    has = (
        f"a GPU here has {people_bytes(memory)}"
        if on_gpus
        else f"{sharing} share this machine's {people_bytes(memory)}"
    )
    if state * sharing > memory:
        error = too_large(f"{field}.{stage.kind}", stage, state, has)
        yield _error(error.field, error.value, error.remedy)
    elif (state + activations) * sharing > memory:
        needs = f"state and activations take about {people_bytes(state + activations)} per rank, but {has}"
        yield _warning(f"{field}.{stage.kind}.microBatchSize", None, f"{needs}; lower it, or sequenceLength")
