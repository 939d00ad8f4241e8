"""What a finished stage leaves: a manifest of files with digests, written last, so that its presence means done.

``<storage>/<stage>/artifact.json`` is an ``Artifact``; the files it lists lie below ``<storage>/<stage>/``.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from pydantic import Field

from headrace_api.base import Figures, Part, Spec, Uri
from headrace_api.stages.base import ArtifactKind, StageConfig

ARTIFACT_FILE = "artifact.json"


def canonical_digest(value: object) -> str:
    """sha256 of a JSON value in one canonical spelling."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def stage_hash(config: StageConfig, *, seed: int, inputs: Mapping[str, str]) -> str:
    """What a stage's result depends on: its typed block, the run's seed and the digests of its inputs.

    Compute is not part of it, nor is any field that is marked as ``Part.EXECUTION``: the same result is wanted from any
    number of nodes, in any layout.

    Args:
        config: the typed block.
        seed: the run's seed.
        inputs: slot -> digest of the artifact in it.
    """
    return canonical_digest(_made_of(config, seed=seed, inputs=inputs, without=(Part.EXECUTION,)))


def resume_identity(config: StageConfig, *, seed: int, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What two runs of a stage must have in common for the one to go on from the other's checkpoint.

    It is what ``stage_hash`` is made of, without the fields that are marked as ``Part.EXTENT``.

    Args:
        config: the typed block.
        seed: the run's seed.
        inputs: slot -> digest of the artifact in it.
    """
    return _made_of(config, seed=seed, inputs=inputs, without=(Part.EXECUTION, Part.EXTENT))


def _made_of(config: StageConfig, *, seed: int, inputs: Mapping[str, str], without: Collection[Part]) -> dict[str, Any]:
    return {"kind": config.KIND, "config": config.dump_without(without), "seed": seed, "inputs": dict(inputs)}


class ArtifactFile(Spec):
    """One file of an artifact."""

    path: str = Field(max_length=1024)
    """path is relative to the stage's folder."""
    bytes: int = Field(ge=0)
    """bytes is the file's size."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """sha256 is the digest of its content."""


class Artifact(Spec):
    """The manifest of a finished stage."""

    kind: ArtifactKind
    """kind is what the files are."""
    run: str
    """run is the name of the run that made it."""
    stage: str
    """stage is the name of the stage that made it."""
    hash: str
    """hash is the stage_hash it was made for."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """inputs maps slots to the digests of the artifacts that were read."""
    files: list[ArtifactFile] = Field(default_factory=list)
    """files are listed by path."""
    metrics: Figures = Field(default_factory=dict)
    """metrics are the figures that the stage ends with; those that are not finite are left out."""
    created_at: datetime
    """createdAt is when the stage finished."""
    duration_seconds: float = Field(ge=0)
    """durationSeconds is the time the finishing attempt took."""

    @property
    def digest(self) -> str:
        """What the artifact is, whoever made it and whenever: kind, hash and the files' digests."""
        files = [[f.path, f.bytes, f.sha256] for f in self.files]
        return canonical_digest({"kind": self.kind, "hash": self.hash, "files": files})


class ArtifactRef(Spec):
    """An artifact by its address and digest; a part of statuses, which keep what a newer operator left."""

    model_config = Spec.model_config | {"extra": "allow"}

    uri: Uri
    """uri is the folder of the stage that made it."""
    digest: str = Field(max_length=64)
    """digest is Artifact.digest; a reader refuses another."""
    kind: ArtifactKind
    """kind is what the files are."""
