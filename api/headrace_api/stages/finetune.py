"""What the stages after pretraining share: a model to start from, records, how often they are read, and an adapter."""

from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from headrace_api.base import FieldError, JsonSchema, Part, Spec, StoredUri, api_rules, rule
from headrace_api.model import Architecture
from headrace_api.parallelism import Parallelism
from headrace_api.stages.base import ArtifactKind, Inputs, RunsAs, StageConfig, StageName
from headrace_api.stages.data import Data, Records
from headrace_api.stages.training import Precision, Schedule, Training


class ModelInputs(Inputs):
    """What the stage starts from."""

    ACCEPTS: ClassVar[dict[str, ArtifactKind]] = {"model": ArtifactKind.CHECKPOINT}

    model: StageName | None = None
    """model names the stage whose model is trained further, if it is not base."""


class LoraTarget(StrEnum):
    """A matrix of each layer, by its name in Megatron; in PEFT's names it may be several."""

    QKV = "qkv"
    """q_proj, k_proj and v_proj."""
    PROJ = "proj"
    """o_proj."""
    FC1 = "fc1"
    """gate_proj and up_proj."""
    FC2 = "fc2"
    """down_proj."""


_TWICE = "names a matrix twice; name each once"


class Lora(Spec):
    """Low-rank updates (arXiv 2106.09685): W + alpha / rank B A, where W stays as it is and B begins at 0."""

    rank: int = Field(32, ge=1, le=4096)
    """rank is the rank of each update."""
    alpha: float = Field(32.0, gt=0, le=65_536)
    """alpha scales the updates, by alpha / rank."""
    targets: list[LoraTarget] = Field(
        default_factory=lambda: [*LoraTarget],
        min_length=1,
        max_length=len(LoraTarget),
        json_schema_extra={"x-kubernetes-validations": [rule("self.all(t, self.exists_one(u, u == t))", _TWICE)]},
    )
    """targets are the matrices of each layer that get an update: qkv (q_proj, k_proj and v_proj, which share one A), proj (o_proj), fc1 (gate_proj and up_proj, which share one A) and fc2 (down_proj); all if unset."""

    def num_parameters(self, arch: Architecture, *, tensor: int = 1) -> int:
        """Parameters of the updates over all layers, on each of ``tensor`` ranks that share the matrices."""
        queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        # The side of a matrix that is the residual stream is whole on every rank, the other one is cut.
        cut = {
            LoraTarget.QKV: queries + 2 * keys,
            LoraTarget.PROJ: queries,
            LoraTarget.FC1: 2 * arch.ffn_hidden_size,
            LoraTarget.FC2: arch.ffn_hidden_size,
        }
        return arch.layers * self.rank * sum(arch.hidden_size + cut[target] // tensor for target in self.targets)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        twice = next((t for t in self.targets if self.targets.count(t) > 1), None)
        if twice is not None:
            raise FieldError("targets", twice.value, _TWICE)
        return self


class Adapter(Spec):
    """What is trained in place of the model's own weights."""

    lora: Lora
    """lora trains low-rank updates of the matrices."""


class BaseModel(Spec):
    """A model that was trained elsewhere."""

    uri: StoredUri
    """uri is a folder or an s3:// prefix with config.json, safetensors and tokenizer.json, as save_pretrained of transformers writes it: Llama, Mistral, Qwen2, Qwen3 or Gemma. A relative path is relative to the manifest."""


_ONE_ORIGIN = (
    "set either from.model, to go on from an earlier stage, or base.uri, to start from a Hugging Face folder; not both"
)
ORIGIN_RULE = rule("(has(self.from) && has(self.from.model)) != has(self.base)", _ONE_ORIGIN)
"""Of every stage here; a class with rules of its own repeats it."""


class StartsFromModel(StageConfig):
    """A stage that starts from a model and reads records, on a mesh."""

    model_config = api_rules(ORIGIN_RULE)

    RUNS_AS = RunsAs.GANG

    from_: ModelInputs | None = Field(None, alias="from")
    """from names the model to start from."""
    base: BaseModel | None = None
    """base is a model to start from that was trained elsewhere."""
    data: Records
    """data is the records."""
    sequence_length: int = Field(1024, ge=8, le=2**24)
    """sequenceLength is the number of tokens in a sample; longer documents are cut to it, and counted."""
    chat_template: str | None = Field(None, max_length=65_536)
    """chatTemplate is the Jinja template of conversations, with {% generation %} around what the assistant says; if unset, the tokenizer's own, or ChatML where it has none."""
    precision: Precision = Precision.BF16
    """precision is the number format of matrix multiplications; fp8 needs a GPU with Transformer Engine."""
    parallelism: Annotated[Parallelism, Part.EXECUTION] = Field(default_factory=Parallelism)
    """parallelism is how one replica is split over ranks; the remaining ranks are data parallel."""

    @property
    def model_stage(self) -> str | None:
        """The stage whose model the stage starts from; None for one that was trained elsewhere."""
        return self.from_.model if self.from_ is not None else None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.model_stage is None) == (self.base is None):
            raise FieldError("from", None, _ONE_ORIGIN)
        return self


class Finetune(StartsFromModel, Training):
    """A stage that trains a model further, on records."""

    model_config = api_rules(ORIGIN_RULE)

    epochs: Annotated[float, Part.EXTENT] = Field(1.0, gt=0, le=10_000)
    """epochs is how often each record is read; the number of steps is the samples of all epochs over globalBatchSize, rounded up."""
    adapter: Adapter | None = None
    """adapter trains a small addition to the model, which itself stays as it is; if unset, every weight is trained. The stage leaves both the model with the addition merged into it and the adapter alone. A new scalar head is always trained."""
    global_batch_size: int = Field(16, ge=1, le=2**24)
    """globalBatchSize is the number of samples in a step, over all ranks."""
    schedule: Schedule = Schedule(learning_rate=2e-5)
    """schedule is the learning rate over the run; learningRate is 2e-5 if the block is left out."""


class OfflineInputs(ModelInputs):
    """What the stage starts from, and records that an earlier stage wrote."""

    ACCEPTS: ClassVar[dict[str, ArtifactKind]] = ModelInputs.ACCEPTS | {"records": ArtifactKind.RECORDS}

    records: StageName | None = None
    """records names a stage that wrote records, which are read besides those of data."""


_NO_RECORDS = "lists none, and from.records is not set: name at least one source, or a stage that wrote records"
_NO_WEIGHT = "is of from.records; leave it out, or name a stage that wrote records"
_HAS_RECORDS = "(has(self.from) && has(self.from.records))"


class EarlyStop(Spec):
    """When a stage ends because its held-out loss no longer falls."""

    patience: int = Field(3, ge=1, le=10**6)
    """patience is the number of measurements in a row without an improvement after which the stage ends; validation.every is the number of steps between two."""
    min_delta: float = Field(0.0, ge=0, le=1000)
    """minDelta is how far the held-out loss must fall below the lowest before, in nats, to count as an improvement."""


class Keep(StrEnum):
    """Which weights a stage leaves."""

    BEST = "best"
    """Those with the lowest held-out loss of all that was measured."""
    LAST = "last"
    """Those of the last step."""


class Samples(Spec):
    """Prompts that are answered before and after a stage, greedily, for people to compare."""

    count: int = Field(16, ge=0, le=1024)
    """count is the number of prompts: the first held-out ones, or the first of all where none are held out; 0 leaves the page out."""
    max_new_tokens: int = Field(128, ge=1, le=2**14)
    """maxNewTokens is the longest answer."""


class Sampled(Spec):
    """A stage whose model answers."""

    samples: Annotated[Samples, Part.EXECUTION] = Field(default_factory=Samples)
    """samples are prompts that are answered before and after the stage: samples.md and samples.html."""


_MEASURED = "need held-out records to measure: set data.validation"
OFFLINE_RULES: tuple[JsonSchema, ...] = (
    ORIGIN_RULE,
    rule(f"(has(self.data.sources) && size(self.data.sources) > 0) || {_HAS_RECORDS}", f"data.sources {_NO_RECORDS}"),
    rule(f"!has(self.data.recordsWeight) || {_HAS_RECORDS}", f"data.recordsWeight {_NO_WEIGHT}"),
    rule(
        "has(self.data.validation) || (!has(self.earlyStop) && (!has(self.keep) || self.keep != 'best'))",
        f"earlyStop and keep: best {_MEASURED}",
    ),
)
"""Of every stage below; a class with rules of its own repeats them."""


class OfflineFinetune(Finetune):
    """A stage that trains on what its records hold, not on answers that the model draws meanwhile."""

    model_config = api_rules(*OFFLINE_RULES)

    from_: OfflineInputs | None = Field(None, alias="from")
    """from names the model to start from, and records that an earlier stage wrote."""
    data: Data = Field(default_factory=Data)
    """data is the records that are trained on, and those that are measured."""
    packing: bool = False
    """packing lays several documents, or pairs, in one sample, each attending only to itself; without it a sample is one."""
    early_stop: Annotated[EarlyStop | None, Part.EXTENT] = None
    """earlyStop ends the stage where its held-out loss no longer falls; it goes through all epochs if unset."""
    keep: Annotated[Keep | None, Part.EXTENT] = None
    """keep is which weights the stage leaves: best or last. If unset, best with earlyStop, whose last weights are worse by what patience allows, and last without it."""

    @property
    def records_stage(self) -> str | None:
        """The stage that wrote some of the records."""
        return self.from_.records if self.from_ is not None else None

    @model_validator(mode="after")
    def _has_records(self) -> Self:
        if self.records_stage is None and not self.data.sources:
            raise FieldError("data.sources", None, _NO_RECORDS)
        if self.records_stage is None and self.data.records_weight is not None:
            raise FieldError("data.recordsWeight", self.data.records_weight, _NO_WEIGHT)
        return self

    @property
    def keeps_best(self) -> bool:
        """Whether the stage leaves the weights with the lowest held-out loss."""
        return self.keep is Keep.BEST or (self.keep is None and self.early_stop is not None)

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if self.data.validation is None and (self.early_stop is not None or self.keep is Keep.BEST):
            raise FieldError("data.validation", None, f"earlyStop and keep: best {_MEASURED}")
        return self
