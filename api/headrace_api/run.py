"""TrainingRun: what users write and what they read back.

``spec`` is the manifest; ``status`` is the object that ``.status`` of the custom resource holds, and that a local run
keeps in ``status.json``.
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
from headrace_api.stages import KINDS, Finetune
from headrace_api.stages.data import cel_addresses_absolute
from headrace_api.storage import NO_STORAGE, RELATIVE, SecretRef, Storage, cel_is_absolute, is_absolute

__all__ = ["Compute", "SecretRef", "Stage", "Storage"]  # beside what is defined here

MAX_NAMES = 48
"""Run and stage name together: an attempt adds two numbers, and a pod's host name has 63 characters."""


class RestartPolicy(Spec):
    """How many failures a stage may have without progress between them before the run fails."""

    max_infra_restarts: int = Field(10, ge=0, le=10_000)
    """maxInfraRestarts bounds the restarts after faults of processes, pods, nodes and storage, for each stage."""
    max_user_restarts: int = Field(0, ge=0, le=100)
    """maxUserRestarts bounds the restarts after bad configuration or data, for each stage; 0 fails at once."""
    reset_after_steps: int = Field(100, ge=1, le=1_000_000_000)
    """resetAfterSteps gives a stage its restarts back once it is this many steps past the furthest step that failed."""
    on_stall: Duration | None = None
    """onStall is how long a rank may take for one training step before it is taken to hang: its stacks are kept, and the
    gang is restarted. If unset, five times its 99th percentile, at least 60s. Other phases, as saving and evaluating, may
    take five times their own 99th percentile, at least this long; where that is not known yet, five times onStall, or 10m."""


class RunSpec(Spec):
    """What is to be done."""

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
                f"self.stages.all(s, !has(s.{kind}) || ({cel_addresses_absolute(f's.{kind}.data')}))",
                f"{kind}.data.sources.uri and {kind}.data.validation.uri: one {RELATIVE}",
            )
            for kind, config in KINDS.items()
            if issubclass(config, Finetune)
        ),
        *reference_rules(),
    )

    runtime: Name = "default"
    """runtime names the TrainingRuntime: images, node pools, environment. A local run needs none."""
    storage: Storage = Field(default_factory=Storage)
    """storage is where artifacts and checkpoints are."""
    seed: int = Field(1234, ge=0, le=2**31 - 1)
    """seed decides every random choice of the run."""
    suspend: bool = False
    """suspend stops the run after a checkpoint, and keeps it stopped."""
    restart_policy: RestartPolicy = Field(default_factory=RestartPolicy)
    """restartPolicy is how many failures a stage may have."""
    ttl_seconds_after_finished: int | None = Field(None, ge=0, le=2**31 - 1)
    """ttlSecondsAfterFinished is how long a run that is Complete or Failed keeps the Jobs, Services and ConfigMaps of its
    finished attempts, and with them their pods' logs; for ever if unset. The run itself, its artifacts and checkpoints
    stay, and so does a deployed model."""
    stages: list[Stage] = Field(min_length=1, max_length=MAX_STAGES)
    """stages run in order; each reads what earlier ones left."""

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        check_references(self.stages)
        return self


class StatusPart(Spec):
    """A block of a status, as any version of the operator may have left it.

    Fields that this version does not know are kept, and written back as they were: a newer operator that was rolled back
    finds them again. A field that does not parse counts as unset, since a status must never stop a run.
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
    """Where a stage is."""

    PENDING = "Pending"
    """It has no attempt: its turn has not come, or its next attempt waits."""
    WAITING = "Waiting"
    """Something outside holds its attempt back: no node has room, a quota is used up, an image cannot be pulled."""
    STARTING = "Starting"
    """Not all pods of its attempt run yet, or their ranks have not joined."""
    RUNNING = "Running"
    """Every pod runs, and the ranks have joined."""
    STOPPING = "Stopping"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @classmethod
    def _missing_(cls, value: object) -> "StageState":
        """A state of a newer operator's: the planner follows the attempt, and finds the state out again."""
        return cls.RUNNING


class StageStatus(StatusPart):
    """One stage, as it is now."""

    name: str
    """name is the stage's name."""
    state: StageState = StageState.PENDING
    """state is where the stage is."""
    hash: str | None = None
    """hash is what the state is about: another spec or other inputs have another hash, and begin again."""
    attempt: int = 0
    """attempt is the number of the newest attempt."""
    settled: int = 0
    """settled is the number of the newest attempt that is dealt with, charged or stopped on request: its end costs nothing more."""
    generation: int | None = None
    """generation is that of the spec that the newest attempt was made from."""
    digest: str | None = None
    """digest is of everything that the newest attempt was resolved to; an edit that changes it takes another attempt."""
    workload: str | None = None
    """workload is the uid of the newest attempt's Job or Deployment, once it was seen; another of the same name is not its."""
    infra_restarts: int = 0
    """infraRestarts counts all restarts after infrastructure faults."""
    user_restarts: int = 0
    """userRestarts counts all restarts after bad configuration or data."""
    infra_spent: int = 0
    """infraSpent is how much of maxInfraRestarts is used up; progress gives it back."""
    user_spent: int = 0
    """userSpent is how much of maxUserRestarts is used up; progress gives it back."""
    failed_step: int = 0
    """failedStep is the furthest step at which an attempt failed."""
    started_at: datetime | None = None
    """startedAt is when the first attempt began."""
    finished_at: datetime | None = None
    """finishedAt is when the stage succeeded or failed."""
    retry_at: datetime | None = None
    """retryAt is when the next attempt begins after a failure."""
    outcome_due_at: datetime | None = None
    """outcomeDueAt is until when an attempt that succeeded may say what it left."""
    active_seconds: float = 0
    """activeSeconds is the time that ended attempts took; suspended time does not count."""
    active_since: datetime | None = None
    """activeSince is when the attempt under way began; unset while there is none."""
    artifact: ArtifactRef | None = None
    """artifact is what the stage left."""
    endpoint: str | None = None
    """endpoint is where a deployed model answers."""
    metrics: dict[str, float] = {}
    """metrics are the figures that the stage ended with."""
    reason: str | None = None
    """reason is one word for the newest failure."""
    message: str | None = None
    """message says the newest failure in full."""


class ConditionType(StrEnum):
    """Conditions of a run; ``kubectl wait --for=condition=Complete`` reads them."""

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
    """status says whether it holds."""
    reason: str
    """reason is one CamelCase word."""
    message: str = ""
    """message is for people."""
    last_transition_time: datetime
    """lastTransitionTime is when status last changed."""


class SavedCheckpoint(StatusPart):
    """A committed checkpoint, as pods report it and statuses keep it."""

    step: int = Field(ge=0)
    """step is the number of optimizer steps that it holds."""
    uri: Uri
    """uri is its folder in storage."""
    time: datetime
    """time is when it was committed."""


class RunStatus(StatusPart):
    """What is known of a run. The columns of ``kubectl get`` are fields of their own."""

    conditions: list[Condition] = []
    """conditions are Complete, Failed and Suspended."""
    observed_generation: int | None = None
    """observedGeneration is the generation of the spec that the conditions are about, as kubectl wait reads it; stages say which one their newest attempt was made from."""
    summary: str | None = None
    """summary is the STATUS column: Pending, Waiting, Starting, Running, Restarting, Stopping, Suspended, Complete or Failed."""
    stage: str | None = None
    """stage is the name of the stage that is under way."""
    step: str | None = None
    """step is done and total of the running stage."""
    progress: str | None = None
    """progress is the running stage's part that is done, as 41%."""
    loss: str | None = None
    """loss is the newest training loss."""
    tokens_per_second: str | None = None
    """tokensPerSecond is the newest throughput."""
    restarts: int = 0
    """restarts counts the restarts of all stages, those too that progress has given back."""
    eta: str | None = None
    """eta is the time that the running stage still needs."""
    phase_message: str | None = None
    """phaseMessage is one line about what the ranks do now, or what is waited for."""
    checkpoint: SavedCheckpoint | None = None
    """checkpoint is the newest committed checkpoint of the running stage."""
    endpoint: str | None = None
    """endpoint is where the deployed model answers."""
    stages: list[StageStatus] = []
    """stages has one entry a stage, in order."""

    def condition(self, kind: ConditionType) -> bool:
        """Whether a condition holds."""
        return any(c.type == kind and c.status == "True" for c in self.conditions)


class ObjectMeta(Spec):
    """The part of a Kubernetes object's metadata that Headrace reads; the rest is kept by the API server."""

    model_config = Spec.model_config | {"extra": "ignore"}

    OTHERS: ClassVar[tuple[str, ...]] = (
        "annotations", "creationTimestamp", "deletionGracePeriodSeconds", "finalizers", "generateName", "labels",
        "managedFields", "ownerReferences", "resourceVersion", "selfLink",
    )  # fmt: skip
    """Fields that Kubernetes has and Headrace does not read."""

    name: Name
    """name is unique in the namespace."""
    namespace: str = "default"
    """namespace is where the run lives."""
    uid: str = ""
    """uid is given by the API server."""
    generation: int | None = None
    """generation is counted up by the API server when the spec changes."""
    deletion_timestamp: datetime | None = None
    """deletionTimestamp is set by the API server when the run is being deleted."""


_TWO_HYPHENS = "has two hyphens in a row, which join names; use one of them"


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
    """metadata is a Kubernetes object's."""
    spec: RunSpec
    """spec is what is to be done."""
    status: RunStatus = Field(default_factory=RunStatus)
    """status is what is known; only the operator writes it."""

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
    """What a cluster refuses of a run that is valid on a machine with a working directory."""
    storage = run.spec.storage.uri
    if storage is None:
        return [FieldError("spec.storage.uri", None, NO_STORAGE.removeprefix("storage.uri "))]
    places = {"spec.storage.uri": storage}
    for i, stage in enumerate(run.spec.stages):
        places |= {dotted(("spec", "stages", i, stage.kind, *path)): uri for path, uri in stage.config.addresses()}
    return [FieldError(f, uri, RELATIVE) for f, uri in places.items() if not is_absolute(uri)]


def as_object(run: TrainingRun) -> dict[str, Any]:
    """The run as a Kubernetes object without its status."""
    return {k: v for k, v in run.dump().items() if k != "status"}
