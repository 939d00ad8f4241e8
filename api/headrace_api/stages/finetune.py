"""What the stages after pretraining share: a model to start from, records, and how often they are read."""

from typing import Annotated, ClassVar

from pydantic import Field

from headrace_api.base import Part
from headrace_api.stages.base import ArtifactKind, Inputs, RunsAs, StageName
from headrace_api.stages.data import Data
from headrace_api.stages.training import Schedule, Training


class ModelInputs(Inputs):
    """What the stage starts from."""

    ACCEPTS: ClassVar[dict[str, ArtifactKind]] = {"model": ArtifactKind.CHECKPOINT}

    model: StageName
    """model names the stage whose model is trained further."""


class Finetune(Training):
    """A stage that trains a model further, on records."""

    RUNS_AS = RunsAs.GANG

    from_: ModelInputs = Field(alias="from")
    """from names the model to start from."""
    data: Data
    """data is the records."""
    epochs: Annotated[float, Part.EXTENT] = Field(1.0, gt=0, le=10_000)
    """epochs is how often each record is read; the number of steps is the samples of all epochs over globalBatchSize, rounded up."""
    sequence_length: int = Field(1024, ge=8, le=2**24)
    """sequenceLength is the number of tokens in a sample; longer documents are cut to it, and counted."""
    global_batch_size: int = Field(16, ge=1, le=2**24)
    """globalBatchSize is the number of samples in a step, over all ranks."""
    schedule: Schedule = Field(default_factory=lambda: Schedule(learning_rate=2e-5))
    """schedule is the learning rate over the run; learningRate is 2e-5 if the block is left out."""
