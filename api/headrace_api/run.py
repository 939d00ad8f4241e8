"""TrainingRun: what users write and what they read back.

``spec`` is the manifest; ``status`` is the object that ``.status`` of the custom resource holds, and that a local run
keeps in ``status.json``.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from headrace_api.artifact import ArtifactRef
from headrace_api.base import (
    MOST,
    Duration,
    FieldError,
    JsonSchema,
    Matches,
    Name,
    ObjectName,
    Quantity,
    Spec,
    StoredUri,
    Uri,
    api_rules,
    rule,
)
from headrace_api.model import cel_dimension
from headrace_api.parallelism import MAX_TENSOR, SPLIT_BY_TENSOR, Parallelism, layout
from headrace_api.stages import (
    KINDS,
    ArtifactKind,
    Corpus,
    Deploy,
    Evaluate,
    Export,
    Pretrain,
    RunsAs,
    Shards,
    StageConfig,
    Tokenizer,
)

MAX_NAMES = 48
"""Run and stage name together: an attempt adds two numbers, and a pod's host name has 63 characters."""

PartName = Annotated[
    str,
    Field(max_length=40),
    Matches(
        r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$",
        "write lower-case letters, digits and single hyphens, beginning with a letter and ending with a letter or digit",
    ),
]
"""A name that is put together with others by two hyphens, and so has no two in a row: what is put together says what of."""


NO_STORAGE = "storage.uri is unset: write s3://bucket/prefix, or a directory that every pod mounts"
RELATIVE = "is relative, and a pod has no folder that it could be relative to: write s3://bucket/prefix or /folder"


def _absolute(uri: str) -> str:
    """``is_absolute`` in CEL."""
    return f"({uri}.startsWith('/') || {uri}.contains('://'))"


def is_absolute(uri: str) -> bool:
    """Whether a ``StoredUri`` means the same in every working directory."""
    return uri.startswith("/") or "://" in uri


class SecretRef(Spec):
    """A Secret in the run's namespace."""

    name: ObjectName
    """name is the Secret's name; its keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY become environment variables."""


class Storage(Spec):
    """Where artifacts and checkpoints are: a directory or an S3 bucket."""

    uri: StoredUri | None = None
    """uri is s3://bucket/prefix or a directory that every pod mounts; a local run defaults to its own folder."""
    endpoint: Annotated[str, Matches(r"^https?://[!-~]+$", "write http://host:port or https://host")] | None = Field(
        None, max_length=256
    )
    """endpoint is the address of an S3 server that is not Amazon's."""
    region: Annotated[str, Matches(r"^[A-Za-z0-9][A-Za-z0-9._-]*$", "write a name, as us-east-1")] | None = Field(
        None, max_length=64
    )
    """region is the bucket's region."""
    secret_ref: SecretRef | None = None
    """secretRef names the Secret with the credentials; a local run takes the usual AWS environment."""


_CORES = r"^([0-9]{1,6}(\.[0-9]{1,3})?|[0-9]{1,9}m)$"
_CORES_REMEDY = "write a number of processors above 0, as 4, 0.5 or 500m"


def _cores(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and not (Matches(_CORES, _CORES_REMEDY).check(value) and re.search("[1-9]", value)):
        raise ValueError(_CORES_REMEDY)
    return value


Cores = Annotated[
    str,
    BeforeValidator(_cores),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "pattern": _CORES,
            "maxLength": 16,
            "x-kubernetes-validations": [
                rule("type(self) == int ? self >= 1 && self < 1000000 : self.matches('[1-9]')", _CORES_REMEDY)
            ],
        }
    ),
]
"""A number of processors, as Kubernetes writes it."""


class Compute(Spec):
    """The machines of a stage."""

    model_config = api_rules(
        rule(
            "self.gpusPerNode == 0 || !has(self.ranksPerNode) || self.ranksPerNode <= self.gpusPerNode",
            "ranksPerNode must be at most gpusPerNode: each rank has a GPU of its own",
        )
    )

    nodes: int = Field(1, ge=1, le=20_000)
    """nodes is the number of pods, one a node."""
    gpus_per_node: int = Field(0, ge=0, le=16)
    """gpusPerNode is the number of GPUs of a pod; 0 trains on CPUs."""
    ranks_per_node: int | None = Field(None, ge=1, le=256)
    """ranksPerNode is the number of processes of a pod: gpusPerNode, or 1 on CPUs, if unset."""
    cpu: Cores | None = None
    """cpu is the processor request of a pod, as 4 or 500m."""
    memory: Quantity | None = Field(None, ge=1, le=MOST)
    """memory is the memory request and limit of a pod, as 16Gi."""

    @model_validator(mode="after")
    def _one_gpu_each(self) -> Self:
        if self.ranks_per_node is not None and 0 < self.gpus_per_node < self.ranks_per_node:
            raise FieldError(
                "ranksPerNode",
                self.ranks_per_node,
                f"must be at most gpusPerNode, {self.gpus_per_node}: each rank has a GPU of its own",
            )
        return self

    @property
    def ranks(self) -> int:
        """Processes of one pod."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def world(self) -> int:
        """Processes of the gang."""
        return self.nodes * self.ranks


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


_WORLD = "{0}.compute.nodes * (has({0}.compute.ranksPerNode) ? {0}.compute.ranksPerNode : ({0}.compute.gpusPerNode > 0 ? {0}.compute.gpusPerNode : 1))"
_STAGE_WORLD = f"({_WORLD.format('self')})"
_REPLICA = "(self.pretrain.parallelism.tensor * self.pretrain.parallelism.pipeline)"
_PER_PASS = f"(self.pretrain.microBatchSize * ({_STAGE_WORLD} / {_REPLICA}))"
_ONE_BLOCK = f"a stage has exactly one typed block of {', '.join(KINDS)}"
_SEVERAL_RANKS = [kind for kind, config in KINDS.items() if config.RUNS_AS is not RunsAs.TASKS]


class Stage(Spec):
    """A name, the machines, and exactly one typed block."""

    model_config = api_rules(
        rule(" + ".join(f"(has(self.{kind}) ? 1 : 0)" for kind in KINDS) + " == 1", _ONE_BLOCK),
        rule("has(self.pretrain) || self.compute.nodes == 1", "compute.nodes must be 1: only pretrain runs on several"),
        rule(
            f"{' || '.join(f'has(self.{kind})' for kind in _SEVERAL_RANKS)} || {_STAGE_WORLD} <= self.compute.nodes",
            f"compute.ranksPerNode must be 1: only {', '.join(_SEVERAL_RANKS)} have several; leave out gpusPerNode too",
        ),
        rule(
            f"!has(self.pretrain) || {_STAGE_WORLD} % {_REPLICA} == 0",
            "parallelism.tensor x parallelism.pipeline must divide the ranks of the gang, compute.nodes x compute.ranksPerNode",
        ),
        rule(
            f"!has(self.pretrain) || {_STAGE_WORLD} % {_REPLICA} != 0 || self.pretrain.globalBatchSize % {_PER_PASS} == 0",
            "globalBatchSize must be a multiple of microBatchSize x data ranks (ranks / tensor / pipeline)",
        ),
        rule(
            "!has(self.pretrain) || self.pretrain.precision != 'fp8' || self.compute.gpusPerNode > 0",
            "precision fp8 needs GPUs with Transformer Engine; set compute.gpusPerNode, or use bf16",
        ),
    )

    name: PartName
    """name is unique in the run; later stages refer to it, and it names the folder in storage."""
    compute: Compute = Field(default_factory=Compute)
    """compute is the machines of this stage."""
    corpus: Corpus | None = None
    """corpus reads raw text and cleans it."""
    tokenizer: Tokenizer | None = None
    """tokenizer learns or imports a tokenizer."""
    shards: Shards | None = None
    """shards turns documents into token ids."""
    pretrain: Pretrain | None = None
    """pretrain trains a model from random weights."""
    evaluate: Evaluate | None = None
    """evaluate measures a model."""
    export: Export | None = None
    """export writes a Hugging Face folder."""
    deploy: Deploy | None = None
    """deploy serves an exported model."""

    @property
    def kind(self) -> str:
        """The name of the typed block that is set."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def config(self) -> StageConfig:
        """The typed block that is set."""
        block = getattr(self, self.kind)
        assert isinstance(block, StageConfig)
        return block

    @model_validator(mode="after")
    def _one_block(self) -> Self:
        blocks = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(blocks) != 1:
            said = " and ".join(blocks) if blocks else "none"
            raise FieldError("", said, _ONE_BLOCK)
        return self

    @model_validator(mode="after")
    def _gang_fits(self) -> Self:
        if self.pretrain is not None:
            try:
                self._check_pretrain(self.pretrain)
            except FieldError as error:
                raise FieldError(f"pretrain.{error.field}", error.value, error.remedy) from error
        elif self.compute.nodes > 1:
            raise FieldError("compute.nodes", self.compute.nodes, f"a {self.kind} stage runs on 1 node")
        if self.config.RUNS_AS is RunsAs.TASKS and self.compute.ranks > 1:
            field = "gpusPerNode" if self.compute.ranks_per_node is None else "ranksPerNode"
            raise FieldError(
                f"compute.{field}", self.compute.ranks, f"a {self.kind} stage has 1 process a node; leave it out"
            )
        return self

    def _check_pretrain(self, pretrain: Pretrain) -> None:
        ranks = layout(pretrain.parallelism, pretrain.model.architecture, num_ranks=self.compute.world)
        per_pass = pretrain.micro_batch_size * ranks.data
        if pretrain.global_batch_size % per_pass:
            raise FieldError(
                "globalBatchSize",
                pretrain.global_batch_size,
                f"must be a multiple of microBatchSize x data ranks, {pretrain.micro_batch_size} x {ranks.data} = {per_pass}",
            )
        if pretrain.precision == "fp8" and self.compute.gpus_per_node == 0:
            raise FieldError(
                "precision", "fp8", "needs GPUs with Transformer Engine; set compute.gpusPerNode, or use bf16"
            )


MAX_STAGES = 32
_PLACES = f"[{', '.join(str(i) for i in range(MAX_STAGES))}]"
"""CEL's macros over a list do not tell the places of its items; a list of places does."""


def _input_rules() -> Iterator[JsonSchema]:
    """Each ``from`` of each kind of stage names an earlier stage that gives what is wanted."""
    givers = {gives: [k for k, c in KINDS.items() if gives == c.GIVES] for gives in ArtifactKind}
    for kind, config in KINDS.items():
        for slot, (wanted, optional) in config.slots().items():
            reader = f"self.stages[i].{kind}"
            unset = f" || !has({reader}.from)" if optional else ""
            given = " || ".join(f"has(self.stages[j].{giver})" for giver in givers[wanted])
            found = f"j < i && self.stages[j].name == {reader}.from.{slot} && ({given})"
            yield rule(
                f"{_PLACES}.all(i, i >= size(self.stages) || !has({reader}){unset} || {_PLACES}.exists(j, {found}))",
                f"{kind}.from.{slot} must name an earlier {' or '.join(givers[wanted])} stage",
            )


def _evaluate_rule(dimension: str) -> JsonSchema:
    divides = f"{cel_dimension(dimension, model='t.pretrain.model')} % ({_WORLD.format('s')}) == 0"
    trained = f"t.name != s.evaluate.from.model || !has(t.pretrain) || {divides}"
    return rule(
        f"self.stages.all(s, !has(s.evaluate) || self.stages.all(t, {trained}))",
        f"compute.ranksPerNode of an evaluate stage must divide its model's {dimension}",
    )


class RunSpec(Spec):
    """What is to be done."""

    model_config = api_rules(
        rule("has(self.storage.uri)", NO_STORAGE),
        rule(f"!has(self.storage.uri) || {_absolute('self.storage.uri')}", f"storage.uri {RELATIVE}"),
        rule(
            f"self.stages.all(s, !has(s.corpus) || s.corpus.sources.all(x, {_absolute('x.uri')}))",
            f"corpus.sources.uri {RELATIVE}",
        ),
        rule(
            "self.stages.all(s, !has(s.tokenizer) || !has(s.tokenizer.__import__) || "
            f"{_absolute('s.tokenizer.__import__.uri')})",
            f"tokenizer.import.uri {RELATIVE}",
        ),
        *_input_rules(),
        rule(
            f"self.stages.all(s, !has(s.evaluate) || {_WORLD.format('s')} <= {MAX_TENSOR})",
            f"compute.ranksPerNode of an evaluate stage must be at most {MAX_TENSOR}",
        ),
        *(_evaluate_rule(dimension) for dimension in SPLIT_BY_TENSOR),
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
    stages: list[Stage] = Field(min_length=1, max_length=MAX_STAGES)
    """stages run in order; each reads what earlier ones left."""

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        seen: dict[str, Stage] = {}
        for i, stage in enumerate(self.stages):
            if stage.name in seen:
                raise FieldError(f"stages[{i}].name", stage.name, "is used twice; names are unique in a run")
            for slot, source in stage.config.inputs().items():
                _check_input(i, stage, slot=slot, source=source, seen=seen)
            if stage.evaluate is not None:
                _check_evaluate(i, stage, model=seen[stage.evaluate.from_.model])
            seen[stage.name] = stage
        return self


def _check_input(i: int, stage: Stage, *, slot: str, source: str, seen: dict[str, Stage]) -> None:
    field, wanted = f"stages[{i}].{stage.kind}.from.{slot}", stage.config.accepts()[slot]
    fitting = [name for name, other in seen.items() if wanted == other.config.GIVES]
    remedy = f"use {' or '.join(fitting)}" if fitting else f"add a stage before it that gives a {wanted}"
    if source not in seen:
        raise FieldError(field, source, f"no earlier stage has this name; {remedy}")
    if wanted != seen[source].config.GIVES:
        gives = seen[source].config.GIVES
        raise FieldError(
            field, source, f"is a {seen[source].kind} stage, which gives a {gives}, not a {wanted}; {remedy}"
        )


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


def _check_evaluate(i: int, stage: Stage, *, model: Stage) -> None:
    """The ranks of an evaluate stage split its model; no other axis is used."""
    ranks = stage.compute.ranks
    field = f"stages[{i}].compute.{'gpusPerNode' if stage.compute.ranks_per_node is None else 'ranksPerNode'}"
    if ranks > MAX_TENSOR:
        raise FieldError(field, ranks, f"the ranks of an evaluate stage split the model; use at most {MAX_TENSOR}")
    if model.pretrain is None:
        return
    try:
        layout(Parallelism(tensor=ranks), model.pretrain.model.architecture, num_ranks=ranks)
    except FieldError as error:
        raise FieldError(field, ranks, f"the ranks of an evaluate stage split the model: {error.remedy}") from error


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


class CheckpointStatus(StatusPart):
    """The newest committed checkpoint of the running stage."""

    step: int
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
    checkpoint: CheckpointStatus | None = None
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
        if stage.corpus is not None:
            places |= {f"spec.stages[{i}].corpus.sources[{j}].uri": s.uri for j, s in enumerate(stage.corpus.sources)}
        if stage.tokenizer is not None and stage.tokenizer.import_ is not None:
            places[f"spec.stages[{i}].tokenizer.import.uri"] = stage.tokenizer.import_.uri
    return [FieldError(f, uri, RELATIVE) for f, uri in places.items() if not is_absolute(uri)]


def as_object(run: TrainingRun) -> dict[str, Any]:
    """The run as a Kubernetes object without its status."""
    return {k: v for k, v in run.dump().items() if k != "status"}
