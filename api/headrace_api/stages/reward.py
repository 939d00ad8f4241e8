"""The reward stage: a model and pairs of answers, of which people prefer one -> a model that scores answers."""

from pydantic import Field

from headrace_api.stages.base import ArtifactKind
from headrace_api.stages.finetune import OfflineFinetune
from headrace_api.stages.training import Schedule


class Reward(OfflineFinetune):
    """Reward modelling: train a scalar head, and the model below it, to score the chosen answer of a pair higher."""

    KIND = "reward"
    GIVES = ArtifactKind.REWARD

    centering: float = Field(0.01, ge=0, le=10)
    """centering is the weight of the squared sum of a pair's scores, which keeps scores around 0; 0 leaves it out."""
    schedule: Schedule = Schedule(learning_rate=1e-5)
    """schedule is the learning rate over the run; learningRate is 1e-5 if the block is left out."""
