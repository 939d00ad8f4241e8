"""What a committed checkpoint is: ``checkpoint.json``, written last. No torch.

Folders are named ``step-<step>-a<attempt>``, and ``-<n>`` is added where that name was used before: a folder is never
written twice, so a writer that outlived its attempt cannot spoil one that was committed later.
"""

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from pydantic import Field

from headrace_api.artifact import ArtifactFile
from headrace_api.base import Spec

MANIFEST_FILE = "checkpoint.json"
CORRUPT_FILE = "corrupt.json"
"""Put beside the manifest of a checkpoint that could not be loaded."""
STATELESS = "stateless"
"""Nothing that is random outlives a step: batches follow from the sample counter, start weights from the seed."""

_NAME = re.compile(r"^step-(\d{8,})-a(\d+)(?:-(\d+))?$")


class Axes(Spec):
    """The layout that wrote a checkpoint; any other can read it."""

    tensor: int
    """tensor is the number of ranks that share each matrix."""
    pipeline: int
    """pipeline is the number of stages."""
    data: int
    """data is the number of replicas."""


class CheckpointManifest(Spec):
    """A committed checkpoint: its files, and what makes it fit to resume from."""

    stage: str
    """stage is the name of the stage."""
    identity: dict[str, Any]
    """identity is the resume_identity of the run: another run goes on from here if it has the same."""
    attempt: int
    """attempt is the one that made it."""
    step: int = Field(ge=0)
    """step is the number of optimizer steps that it holds."""
    steps: int = Field(ge=1)
    """steps is the number that the run had to do when it was made."""
    consumed_samples: int = Field(ge=0)
    """consumedSamples is the whole state of the data: the number of the next sample."""
    layout: Axes
    """layout is the one that wrote it."""
    rng_policy: str = STATELESS
    """rngPolicy says where random state is: stateless, for none."""
    created_at: datetime
    """createdAt is when it was committed."""
    files: list[ArtifactFile]
    """files are listed by path, below the checkpoint's folder."""


def folder_name(step: int, attempt: int, *, taken: Iterable[str] = ()) -> str:
    """A name for a checkpoint's folder that is not in ``taken``."""
    used, name, n = set(taken), f"step-{step:08d}-a{attempt}", 0
    while name in used:
        n += 1
        name = f"step-{step:08d}-a{attempt}-{n}"
    return name


def newest_first(names: Iterable[str]) -> list[str]:
    """Folder names by step, then attempt, then number, the newest first; names of other things are left out."""
    matches = [m for name in names if (m := _NAME.match(name))]
    ordered = sorted(matches, key=lambda m: tuple(int(part or 0) for part in m.groups()), reverse=True)
    return [m.group(0) for m in ordered]


def step_of(name: str) -> int:
    """The step in a folder's name."""
    return _number(name, 1)


def attempt_of(name: str) -> int:
    """The attempt in a folder's name."""
    return _number(name, 2)


def _number(name: str, group: int) -> int:
    match = _NAME.match(name)
    assert match is not None, name
    return int(match.group(group))
