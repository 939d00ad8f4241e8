"""Artifacts: what a finished stage leaves. The manifest, with digests, is written last, so its presence means done.

``<storage>/<stage>/artifact.json`` is an ``Artifact``; its files lie below ``<storage>/<stage>/``.
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
    """SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def stage_hash(config: StageConfig, *, seed: int, inputs: Mapping[str, str]) -> str:
    """Digest of what a stage's result depends on: its typed block, the run's seed and its inputs' digests.

    Excludes compute and fields marked ``Part.EXECUTION``: the result must not depend on the number of nodes or the
    layout.

    Args:
        config: the typed block.
        seed: the run's seed.
        inputs: slot -> digest of its artifact.
    """
    return canonical_digest(_made_of(config, seed=seed, inputs=inputs, without=(Part.EXECUTION,)))


def resume_identity(config: StageConfig, *, seed: int, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What two runs of a stage must share for one to resume from the other's checkpoint.

    The input of ``stage_hash``, without the fields marked ``Part.EXTENT``.

    Args:
        config: the typed block.
        seed: the run's seed.
        inputs: slot -> digest of its artifact.
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
    """run is the name of the run that produced it."""
    stage: str
    """stage is the name of the stage that produced it."""
    hash: str
    """hash is the stage_hash it was produced for."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """inputs maps slots to the digests of the artifacts that were read."""
    files: list[ArtifactFile] = Field(default_factory=list)
    """files is sorted by path."""
    metrics: Figures = Field(default_factory=dict)
    """metrics are the stage's final metrics, without non-finite ones."""
    created_at: datetime
    """createdAt is when the stage finished."""
    duration_seconds: float = Field(ge=0)
    """durationSeconds is how long the successful attempt took."""

    @property
    def digest(self) -> str:
        """Identifies the content, whoever produced it and when: kind, hash and the files' digests."""
        files = [[f.path, f.bytes, f.sha256] for f in self.files]
        return canonical_digest({"kind": self.kind, "hash": self.hash, "files": files})


class ArtifactRef(Spec):
    """A reference to an artifact, by URI and digest. Part of statuses, so unknown fields are kept."""

    model_config = Spec.model_config | {"extra": "allow"}

    uri: Uri
    """uri is the folder of the stage that produced it."""
    digest: str = Field(max_length=64)
    """digest is Artifact.digest; readers refuse any other."""
    kind: ArtifactKind
    """kind is what the files are."""
