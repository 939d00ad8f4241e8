"""TrainingRun: what users write and read back.

``spec`` is the manifest. ``status`` is the custom resource's ``.status``, which a local run keeps in ``status.json``.
"""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from headrace_api.artifact import ArtifactRef
from headrace_api.base import Duration, FieldError, Name, Spec, Uri, api_rules, rule
from headrace_api.compute import Compute
from headrace_api.plain_yaml import dotted
from headrace_api.references import MAX_STAGES, check_references, reference_rules
from headrace_api.stage import Stage
from headrace_api.stages import KINDS, OfflineFinetune, StartsFromModel
from headrace_api.stages.data import cel_sources_absolute, cel_validation_absolute
from headrace_api.storage import NO_STORAGE, RELATIVE, SecretRef, Storage, cel_is_absolute, is_absolute

__all__ = ["Compute", "SecretRef", "Stage", "Storage"]  # beside what is defined here

MAX_NAMES = 48
"""Limit on run plus stage name: an attempt adds two numbers, and a pod's host name has 63 characters."""


class RestartPolicy(Spec):
    """How many times a stage may fail without progress in between before the run fails."""

    max_infra_restarts: int = Field(10, ge=0, le=10_000)
    """maxInfraRestarts bounds each stage's restarts after faults of processes, pods, nodes and storage."""
    max_user_restarts: int = Field(0, ge=0, le=100)
    """maxUserRestarts bounds each stage's restarts after bad configuration or data; 0 fails at once."""
    reset_after_steps: int = Field(100, ge=1, le=1_000_000_000)
    """resetAfterSteps resets a stage's budgets once it is this many steps past the furthest step that failed."""
    on_stall: Duration | None = None
    """onStall is how long a training step may take before its rank counts as hung. Its stacks are then saved and the
    gang restarts. Defaults to five times the rank's 99th percentile step time, at least 60s. Other phases, such as
    saving and evaluating, may take five times their own 99th percentile, at least onStall; five times onStall, or 10m,
    while unknown."""


class RunSpec(Spec):
    """What the run should do."""

    model_config = api_rules(
        rule("has(self.storage.uri)", NO_STORAGE),
        rule(f"!has(self.storage.uri) || {cel_is_absolute('self.storage.uri')}", f"storage.uri {RELATIVE}"),
        rule(
            f"self.stages.all(s, !has(s.corpus) || s.corpus.sources.all(x, {cel_is_absolute('x.uri')}))",
            f"corpus.sources.uri {RELATIVE}",
        ),
        rule(
            "self.stages.all(s, !has(s.tokenizer) || !has(s.tokenizer.__import__) || "
            f"{cel_is_absolute('s.tokenizer.__import__.uri')})",
            f"tokenizer.import.uri {RELATIVE}",
        ),
        *(
            rule(
                f"self.stages.all(s, !has(s.{kind}) || {cel_sources_absolute(f's.{kind}.data')})",
                f"{kind}.data.sources.uri {RELATIVE}",
            )
            for kind, config in KINDS.items()
            if issubclass(config, StartsFromModel)
        ),
        *(
            rule(
                f"self.stages.all(s, !has(s.{kind}) || {cel_validation_absolute(f's.{kind}.data')})",
                f"{kind}.data.validation.uri {RELATIVE}",
            )
            for kind, config in KINDS.items()
            if issubclass(config, OfflineFinetune)
        ),
        rule(
            "self.stages.all(s, !has(s.evaluate) || !has(s.evaluate.exactMatch) || "
            f"s.evaluate.exactMatch.all(q, {cel_is_absolute('q.uri')}))",
            f"evaluate.exactMatch.uri {RELATIVE}",
        ),
        rule(
            "self.stages.all(s, !has(s.constitutional) || !has(s.constitutional.constitution.uri) || "
            f"{cel_is_absolute('s.constitutional.constitution.uri')})",
            f"constitutional.constitution.uri {RELATIVE}",
        ),
        *(
            rule(
                f"self.stages.all(s, !has(s.{kind}) || !has(s.{kind}.base) || {cel_is_absolute(f's.{kind}.base.uri')})",
                f"{kind}.base.uri {RELATIVE}",
            )
            for kind, config in KINDS.items()
            if issubclass(config, StartsFromModel)
        ),
        *reference_rules(),
    )

    runtime: Name = "default"
    """runtime names the TrainingRuntime: images, node pools, environment. Local runs need none."""
    storage: Storage = Field(default_factory=Storage)
    """storage is where artifacts and checkpoints are kept."""
    seed: int = Field(1234, ge=0, le=2**31 - 1)
    """seed determines every random choice of the run."""
    suspend: bool = False
    """suspend stops the run after a checkpoint and keeps it stopped."""
    restart_policy: RestartPolicy = Field(default_factory=RestartPolicy)
    """restartPolicy sets the retry budgets of each stage."""
    ttl_seconds_after_finished: int | None = Field(None, ge=0, le=2**31 - 1)
    """ttlSecondsAfterFinished is how long a Complete or Failed run keeps the Jobs, Services and ConfigMaps of its
    finished attempts, and with them their pods' logs; for ever if unset. The run itself, its artifacts and checkpoints,
    and any deployed model stay."""
    stages: list[Stage] = Field(min_length=1, max_length=MAX_STAGES)
    """stages run in order; each one reads what earlier ones produced."""

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        check_references(self.stages)
        return self


class StatusPart(Spec):
    """A block of a status, from any version of the operator.

    Unknown fields are kept and written back unchanged, so that they survive a rollback of the operator. An invalid
    field counts as unset: a status must never stop a run.
    """

    model_config = Spec.model_config | {"extra": "allow"}

    @model_validator(mode="wrap")
    @classmethod
    def _without_what_does_not_parse(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            bad = {e["loc"][0] for e in error.errors() if e["loc"]}
            if not isinstance(value, Mapping) or not bad & value.keys():
                raise
            return handler({k: v for k, v in value.items() if k not in bad})


class StageState(StrEnum):
    """The state of a stage."""

    PENDING = "Pending"
    """No attempt: its turn has not come, or its next attempt is backing off."""
    WAITING = "Waiting"
    """Something outside holds its attempt back: no room on any node, an exhausted quota, an image that cannot be pulled."""
    STARTING = "Starting"
    """Some of its pods do not run yet, or its ranks have not joined."""
    RUNNING = "Running"
    """All pods run, and the ranks have joined."""
    STOPPING = "Stopping"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @classmethod
    def _missing_(cls, value: object) -> "StageState":
        """A state from a newer operator. The planner follows the attempt and finds out the real state."""
        return cls.RUNNING


class StageStatus(StatusPart):
    """The status of one stage."""

    name: str
    """name is the stage's name."""
    state: StageState = StageState.PENDING
    """state is the stage's current state."""
    hash: str | None = None
    """hash identifies the spec and inputs that this status is about; when they change, the stage starts over."""
    attempt: int = 0
    """attempt is the number of the newest attempt."""
    settled: int = 0
    """settled is the newest attempt that has been charged to a budget or stopped on request; it is never charged again."""
    generation: int | None = None
    """generation is the spec generation from which the newest attempt was made."""
    digest: str | None = None
    """digest covers everything the newest attempt was resolved to; an edit that changes it needs a new attempt."""
    workload: str | None = None
    """workload is the uid of the newest attempt's Job or Deployment, once seen; an object with another uid is not its."""
    infra_restarts: int = 0
    """infraRestarts counts all restarts after infrastructure faults."""
    user_restarts: int = 0
    """userRestarts counts all restarts after bad configuration or data."""
    infra_spent: int = 0
    """infraSpent is how much of maxInfraRestarts is used up; progress resets it."""
    user_spent: int = 0
    """userSpent is how much of maxUserRestarts is used up; progress resets it."""
    failed_step: int = 0
    """failedStep is the furthest step at which an attempt failed."""
    started_at: datetime | None = None
    """startedAt is when the first attempt started."""
    finished_at: datetime | None = None
    """finishedAt is when the stage succeeded or failed."""
    retry_at: datetime | None = None
    """retryAt is when the next attempt starts after a failure."""
    outcome_due_at: datetime | None = None
    """outcomeDueAt is how long to wait for the outcome of an attempt that succeeded."""
    active_seconds: float = 0
    """activeSeconds is the total duration of ended attempts; suspended time does not count."""
    active_since: datetime | None = None
    """activeSince is when the current attempt became active; unset if there is none."""
    artifact: ArtifactRef | None = None
    """artifact is what the stage produced."""
    endpoint: str | None = None
    """endpoint is where a deployed model answers."""
    metrics: dict[str, float] = {}
    """metrics are the stage's final metrics."""
    reason: str | None = None
    """reason is one word for the latest failure."""
    message: str | None = None
    """message describes the latest failure in full."""


class ConditionType(StrEnum):
    """Conditions of a run, as read by ``kubectl wait --for=condition=Complete``."""

    COMPLETE = "Complete"
    FAILED = "Failed"
    SUSPENDED = "Suspended"


def _known_type(value: str) -> str:
    return ConditionType(value) if value in set(ConditionType) else value


class Condition(StatusPart):
    """A Kubernetes condition."""

    type: Annotated[str, AfterValidator(_known_type)]
    """type names the condition: Complete, Failed or Suspended."""
    status: Literal["True", "False", "Unknown"]
    """status says whether the condition holds."""
    reason: str
    """reason is one CamelCase word."""
    message: str = ""
    """message is for people."""
    last_transition_time: datetime
    """lastTransitionTime is when status last changed."""


class SavedCheckpoint(StatusPart):
    """A committed checkpoint, as reported by pods and kept in statuses."""

    step: int = Field(ge=0)
    """step is the number of optimizer steps it covers."""
    uri: Uri
    """uri is its folder in storage."""
    time: datetime
    """time is when it was committed."""


class RunStatus(StatusPart):
    """The status of a run. Each column of ``kubectl get`` has its own field."""

    conditions: list[Condition] = []
    """conditions are Complete, Failed and Suspended."""
    observed_generation: int | None = None
    """observedGeneration is the spec generation that the conditions describe, as kubectl wait expects; stages say which one their newest attempt was made from."""
    summary: str | None = None
    """summary is the STATUS column: Pending, Waiting, Starting, Running, Restarting, Stopping, Suspended, Complete or Failed."""
    stage: str | None = None
    """stage is the name of the current stage."""
    step: str | None = None
    """step is the done and total steps of the running stage."""
    progress: str | None = None
    """progress is how much of the running stage is done, such as 41%."""
    loss: str | None = None
    """loss is the latest training loss."""
    tokens_per_second: str | None = None
    """tokensPerSecond is the latest throughput."""
    restarts: int = 0
    """restarts counts the restarts of all stages, whether or not progress has reset their budgets."""
    eta: str | None = None
    """eta is the estimated time left in the running stage."""
    phase_message: str | None = None
    """phaseMessage says in one line what the ranks are doing, or what the run waits for."""
    checkpoint: SavedCheckpoint | None = None
    """checkpoint is the latest committed checkpoint of the running stage."""
    endpoint: str | None = None
    """endpoint is where the deployed model answers."""
    stages: list[StageStatus] = []
    """stages has one entry per stage, in order."""

    def condition(self, kind: ConditionType) -> bool:
        """Whether a condition holds."""
        return any(c.type == kind and c.status == "True" for c in self.conditions)


class ObjectMeta(Spec):
    """The object metadata that Headrace reads; the API server keeps the rest."""

    model_config = Spec.model_config | {"extra": "ignore"}

    OTHERS: ClassVar[tuple[str, ...]] = (
        "annotations", "creationTimestamp", "deletionGracePeriodSeconds", "finalizers", "generateName", "labels",
        "managedFields", "ownerReferences", "resourceVersion", "selfLink",
    )  # fmt: skip
    """Metadata fields of Kubernetes that Headrace does not read."""

    name: Name
    """name is unique in the namespace."""
    namespace: str = "default"
    """namespace is the run's namespace."""
    uid: str = ""
    """uid is set by the API server."""
    generation: int | None = None
    """generation is incremented by the API server when the spec changes."""
    deletion_timestamp: datetime | None = None
    """deletionTimestamp is set by the API server when the run is being deleted."""


_TWO_HYPHENS = "has two hyphens in a row, which separate names; use one"


class TrainingRun(Spec):
    """Raw text in, served model out."""

    model_config = api_rules(
        rule("!self.metadata.name.contains('--')", f"metadata.name {_TWO_HYPHENS}"),
        rule(
            f"self.spec.stages.all(s, size(s.name) + size(self.metadata.name) <= {MAX_NAMES})",
            f"the run's name and a stage's name have more than {MAX_NAMES} characters together, too many for a pod's host name",
        ),
    )

    api_version: Literal["headrace.dev/v1alpha1"]
    """apiVersion is headrace.dev/v1alpha1."""
    kind: Literal["TrainingRun"]
    """kind is TrainingRun."""
    metadata: ObjectMeta
    """metadata is standard Kubernetes object metadata."""
    spec: RunSpec
    """spec is what the run should do."""
    status: RunStatus = Field(default_factory=RunStatus)
    """status is written by the operator only."""

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        if "--" in self.metadata.name:
            raise FieldError("metadata.name", self.metadata.name, _TWO_HYPHENS)
        for i, stage in enumerate(self.spec.stages):
            if len(self.metadata.name) + len(stage.name) > MAX_NAMES:
                raise FieldError(
                    f"spec.stages[{i}].name",
                    stage.name,
                    f"with the run's name it has more than {MAX_NAMES} characters, too many for a pod's host name",
                )
        return self


def cluster_errors(run: TrainingRun) -> list[FieldError]:
    """Reasons for a cluster to refuse a run that is valid on a machine with a working directory."""
    storage = run.spec.storage.uri
    if storage is None:
        return [FieldError("spec.storage.uri", None, NO_STORAGE.removeprefix("storage.uri "))]
    places = {"spec.storage.uri": storage}
    for i, stage in enumerate(run.spec.stages):
        places |= {dotted(("spec", "stages", i, stage.kind, *path)): uri for path, uri in stage.config.addresses()}
    return [FieldError(f, uri, RELATIVE) for f, uri in places.items() if not is_absolute(uri)]


def as_object(run: TrainingRun) -> dict[str, Any]:
    """The run as a Kubernetes object, without its status."""
    return {k: v for k, v in run.dump().items() if k != "status"}
