"""What the control plane and the pods say to each other.

In: ``stage.json`` is a ``ResolvedStage``. Out: ``Progress`` by HTTP while it runs, ``faults.Outcome`` at the end.
"""

import re
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from pydantic import Field

from headrace_api.artifact import ArtifactRef, canonical_digest
from headrace_api.base import Duration, Figure, Spec, Uri
from headrace_api.run import SavedCheckpoint, Stage, Storage

STAGE_FILE = "stage.json"
TOKEN_AUDIENCE = "headrace-progress"
PROGRESS_PATH = "/v1/progress"
STARTING_PHASE = "Starting"
"""What a rank reports until it has joined the others."""
_MAX_COUNT = 2**63 - 1


class ResolvedStage(Spec):
    """Everything that an attempt needs to know, but for secrets."""

    run: str
    """run is the name of the TrainingRun."""
    namespace: str = "default"
    """namespace is where the run lives."""
    run_uid: str = ""
    """runUid tells this run from an earlier one of the same name."""
    runtime: str = "default"
    """runtime is the name of the TrainingRuntime."""
    stage: Stage
    """stage is the stage as written, with every default filled in."""
    attempt: int = Field(ge=1)
    """attempt counts from 1."""
    seed: int
    """seed is the run's seed."""
    hash: str
    """hash is the stage_hash: an artifact with the same hash is this stage's result."""
    inputs: dict[str, ArtifactRef] = Field(default_factory=dict)
    """inputs maps slots to artifacts."""
    storage: Storage
    """storage is where artifacts are, without credentials."""
    output_uri: Uri
    """outputUri is the stage's folder in storage."""
    on_stall: Duration | None = None
    """onStall is the run's restartPolicy.onStall."""
    progress_url: str | None = None
    """progressUrl is where Progress is reported: http(s), or a file."""

    @property
    def digest(self) -> str:
        """Of everything that takes another attempt where it differs: not a server's replicas, which change in place.

        Defaults are left out, so that a version with more fields finds the same digest for the same manifest.
        """
        apart: dict[str, Any] = {"attempt": True, "progress_url": True, "stage": {"deploy": {"replicas"}}}
        return canonical_digest(
            self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True, exclude=apart)
        )


class Progress(Spec):
    """How far an attempt is; the newest report replaces the one before. Fields of a newer trainer are passed over."""

    model_config = Spec.model_config | {"extra": "ignore"}

    stage: str
    """stage is the name of the stage."""
    attempt: int
    """attempt counts from 1."""
    phase: str = Field(STARTING_PHASE, max_length=32)
    """phase is what the ranks do now: Starting, until they have joined, then Loading, Running, Saving, Evaluating, Serving or Stopping."""
    done: int = Field(0, ge=0, le=_MAX_COUNT)
    """done counts finished units."""
    total: int | None = Field(None, ge=0, le=_MAX_COUNT)
    """total is the number of units, where it is known."""
    unit: str = Field("steps", max_length=16)
    """unit is what is counted: steps, documents, tokens."""
    loss: Figure = None
    """loss is the newest training loss, in nats a token."""
    tokens_per_second: Figure = None
    """tokensPerSecond is over the last few steps, all ranks together."""
    eta_seconds: Figure = None
    """etaSeconds is the time left at the present speed."""
    checkpoint: SavedCheckpoint | None = None
    """checkpoint is the newest committed one."""
    endpoint: str | None = None
    """endpoint is the address of a server that has answered."""
    message: str = Field("", max_length=1024)
    """message is one line for people."""
    time: datetime
    """time is when the report was made."""


class ProgressReport(Spec):
    """The body of a POST to ``PROGRESS_PATH``: a pod may report for its own namespace, run, stage and attempt only."""

    namespace: str
    """namespace is the run's."""
    run: str
    """run is the run's name."""
    progress: Progress
    """progress is the newest heartbeat."""


def service_name(run: str, stage: str) -> str:
    """The Service of a deployed model, which is its host name too. No part has two hyphens in a row, so none collide."""
    return f"{run}--{stage}"


def join_uri(base: str, *parts: str) -> str:
    """``base`` and ``parts`` with single slashes between them; works for s3://, file:// and paths."""
    return "/".join([base.rstrip("/"), *(str(PurePosixPath(p)) for p in parts)])


def served_model_name(run: str, stage: str) -> str:
    """What a server calls its model in ``/v1/models``: ``run/stage``, the export stage's.

    It is the name of a Hugging Face repository too, in which two hyphens cannot follow one another: they mean a slash.
    """
    return "/".join(re.sub("-{2,}", "-", name) for name in (run, stage))
