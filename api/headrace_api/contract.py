"""The contract between control plane and pods.

In: ``stage.json``, a ``ResolvedStage``. Out: ``Progress`` over HTTP while it runs, ``faults.Outcome`` at the end.
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
REPORT_AFTER_HEADER = "Headrace-Report-After"
"""In the answer to a report: seconds until the next one that brings only new numbers."""
STARTING_PHASE = "Starting"
"""The phase of a rank until it has joined the others."""
_MAX_COUNT = 2**63 - 1


class ResolvedStage(Spec):
    """Everything an attempt needs to know, except secrets."""

    run: str
    """run is the name of the TrainingRun."""
    namespace: str = "default"
    """namespace is the run's namespace."""
    run_uid: str = ""
    """runUid distinguishes this run from an earlier one of the same name."""
    runtime: str = "default"
    """runtime is the name of the TrainingRuntime."""
    stage: Stage
    """stage is the stage as written, with all defaults filled in."""
    attempt: int = Field(ge=1)
    """attempt counts from 1."""
    seed: int
    """seed is the run's seed."""
    hash: str
    """hash is the stage_hash: an artifact with this hash is this stage's result."""
    inputs: dict[str, ArtifactRef] = Field(default_factory=dict)
    """inputs maps slots to artifacts."""
    storage: Storage
    """storage is where artifacts are kept, without credentials."""
    output_uri: Uri
    """outputUri is the stage's folder in storage."""
    on_stall: Duration | None = None
    """onStall is the run's restartPolicy.onStall."""
    progress_url: str | None = None
    """progressUrl is where Progress is reported: an http(s) or file URL."""

    @property
    def digest(self) -> str:
        """Covers everything whose change needs a new attempt. Excludes a server's replicas, which change in place.

        Defaults are omitted, so that a version with more fields computes the same digest for the same manifest.
        """
        apart: dict[str, Any] = {"attempt": True, "progress_url": True, "stage": {"deploy": {"replicas"}}}
        return canonical_digest(
            self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True, exclude=apart)
        )


class Progress(Spec):
    """An attempt's progress; each report replaces the one before. Unknown fields are ignored."""

    model_config = Spec.model_config | {"extra": "ignore"}

    stage: str
    """stage is the name of the stage."""
    attempt: int
    """attempt counts from 1."""
    phase: str = Field(STARTING_PHASE, max_length=32)
    """phase is what the ranks are doing: Starting (until they have joined), then Loading, Running, Saving, Evaluating, Serving or Stopping."""
    done: int = Field(0, ge=0, le=_MAX_COUNT)
    """done counts finished units."""
    total: int | None = Field(None, ge=0, le=_MAX_COUNT)
    """total is the number of units, if known."""
    unit: str = Field("steps", max_length=16)
    """unit is what is counted: steps, documents, tokens."""
    loss: Figure = None
    """loss is the latest training loss, in nats per token."""
    tokens_per_second: Figure = None
    """tokensPerSecond is the throughput of all ranks over the last few steps."""
    eta_seconds: Figure = None
    """etaSeconds is the estimated time left at the current speed."""
    checkpoint: SavedCheckpoint | None = None
    """checkpoint is the latest committed checkpoint."""
    endpoint: str | None = None
    """endpoint is the URL of a server that has answered."""
    message: str = Field("", max_length=1024)
    """message is one line for people."""
    time: datetime
    """time is when the report was made."""


class ProgressReport(Spec):
    """The body of a POST to ``PROGRESS_PATH``. A pod may report only for its own namespace, run, stage and attempt."""

    namespace: str
    """namespace is the run's namespace."""
    run: str
    """run is the run's name."""
    progress: Progress
    """progress is the latest progress."""


def service_name(run: str, stage: str) -> str:
    """The Service, and host name, of a deployed model. No part has two hyphens in a row, so names never collide."""
    return f"{run}--{stage}"


def join_uri(base: str, *parts: str) -> str:
    """Join ``base`` and ``parts`` with single slashes. Works for s3://, file:// and paths."""
    return "/".join([base.rstrip("/"), *(str(PurePosixPath(p)) for p in parts)])


def served_model_name(run: str, stage: str) -> str:
    """The model's name in ``/v1/models``: ``run/stage``, where the stage is the export.

    Also a Hugging Face repository name, in which two hyphens in a row would stand for a slash.
    """
    return "/".join(re.sub("-{2,}", "-", name) for name in (run, stage))
