"""What every stage that trains a model lets a training engineer decide: batches, precision, layout, schedule, checkpoints.

In: ``Training``, the base of ``pretrain``, ``sft``, ``reward``, ``rl`` and ``dpo``. The engine's loop reads nothing else of a stage.
"""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from headrace_api.base import Cadence, FieldError, Part, Spec, api_rules, rule
from headrace_api.parallelism import Parallelism
from headrace_api.stages.base import StageConfig


class Precision(StrEnum):
    """The number format of matrix multiplications."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"


class Fp8Recipe(StrEnum):
    """Where the scales of fp8 tensors come from."""

    DELAYED = "delayed"
    """From the largest values of earlier steps: the cheapest. The history is part of the checkpoint."""
    TENSORWISE = "tensorwise"
    """From each tensor's current values."""
    BLOCKWISE = "blockwise"
    """From each block of 128 x 128 weights or 128 activations: the closest to bf16 (arXiv 2412.19437, section 3.3)."""


class Decay(StrEnum):
    """How the learning rate falls after its warm-up."""

    COSINE = "cosine"
    CONSTANT = "constant"


class OnMismatch(StrEnum):
    """What to do if checkpoints of unfinished work do not match the manifest."""

    REFUSE = "refuse"
    RESTART = "restart"


class Schedule(Spec):
    """The learning rate over the run."""

    model_config = api_rules(
        rule(
            "!has(self.minLearningRate) || self.minLearningRate <= self.learningRate",
            "minLearningRate must be at most learningRate",
        )
    )

    learning_rate: float = Field(3e-4, gt=0)
    """learningRate is the peak, reached at the end of the warm-up."""
    min_learning_rate: float | None = Field(None, ge=0)
    """minLearningRate is where the decay ends; defaults to a tenth of learningRate."""
    warmup: int = Field(0, ge=0, le=10**9)
    """warmup is the number of steps over which the rate rises from 0."""
    decay: Decay = Decay.COSINE
    """decay is the curve from the peak to minLearningRate: cosine, or constant for no decay."""

    @property
    def final_rate(self) -> float:
        """The rate at the last step."""
        return self.learning_rate / 10 if self.min_learning_rate is None else self.min_learning_rate

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.final_rate > self.learning_rate:
            raise FieldError(
                "minLearningRate", self.min_learning_rate, f"must be at most learningRate, {self.learning_rate}"
            )
        return self


class Optimizer(Spec):
    """AdamW (arXiv 1711.05101), with its state sharded over the data axis."""

    beta1: float = Field(0.9, ge=0, lt=1)
    """beta1 is the decay rate of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """beta2 is the decay rate of the second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """epsilon is added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """weightDecay is applied to matrices, not to norms."""
    clip_norm: float = Field(1.0, gt=0)
    """clipNorm is the gradient norm above which gradients are clipped."""


class Checkpointing(Spec):
    """When the full training state is saved, and how many saves are kept."""

    every: Cadence = 200
    """every is the interval between saves: a number of steps (100) or a duration (30m)."""
    keep: int = Field(2, ge=1, le=100)
    """keep is how many of the latest checkpoints stay in storage while the stage runs."""
    on_mismatch: OnMismatch = OnMismatch.REFUSE
    """onMismatch decides what happens if unfinished work used different values (model, data or seed): refuse fails and names them; restart starts at step 0 beside it."""


class Validation(Spec):
    """How often the held-out loss is measured."""

    every: int = Field(100, ge=1, le=10**9)
    """every is the number of steps between measurements; the last step is always measured."""
    samples: int = Field(64, ge=1, le=10**9)
    """samples is the number of sequences per measurement."""


class NonFinite(Spec):
    """How many steps may be skipped because of a non-finite loss or gradient."""

    max_in_a_row: int = Field(3, ge=0, le=1000)
    """maxInARow bounds consecutive skipped steps. Beyond it, training rolls back to an older checkpoint once, skips the data read since, and fails if that does not help within 1000 steps."""
    max_per_1000_steps: int = Field(10, ge=0, le=1000)
    """maxPer1000Steps bounds the skipped steps among the last 1000; exceeding it has the same effect."""


class Training(StageConfig):
    """A stage that goes through the training loop."""

    sequence_length: int = Field(2048, ge=8, le=2**24)
    """sequenceLength is the number of tokens per sample."""
    global_batch_size: int = Field(256, ge=1, le=2**24)
    """globalBatchSize is the number of samples per step, over all ranks."""
    micro_batch_size: Annotated[int, Part.EXECUTION] = Field(1, ge=1, le=2**20)
    """microBatchSize is the number of samples per forward pass of one rank."""
    precision: Precision = Precision.BF16
    """precision is the number format of matrix multiplications; fp8 needs a GPU with Transformer Engine."""
    fp8_recipe: Fp8Recipe | None = None
    """fp8Recipe is where the scales of fp8 tensors come from: tensorwise (the default), delayed or blockwise."""
    parallelism: Annotated[Parallelism, Part.EXECUTION] = Field(default_factory=Parallelism)
    """parallelism is how one replica is split over ranks; the remaining ranks are data parallel."""
    schedule: Schedule = Field(default_factory=Schedule)
    """schedule is the learning rate over the run."""
    optimizer: Optimizer = Field(default_factory=Optimizer)
    """optimizer holds AdamW's hyperparameters."""
    checkpoint: Annotated[Checkpointing, Part.EXECUTION] = Field(default_factory=Checkpointing)
    """checkpoint is when the training state is saved."""
    non_finite: Annotated[NonFinite, Part.EXECUTION] = Field(default_factory=NonFinite)
    """nonFinite is how many steps may be skipped because of a non-finite loss or gradient."""
    validation: Annotated[Validation, Part.EXECUTION] = Field(default_factory=Validation)
    """validation is when the held-out loss is measured."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch."""
        return self.sequence_length * self.global_batch_size
