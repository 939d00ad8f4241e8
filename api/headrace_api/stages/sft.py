"""The sft stage: a model and demonstrations -> a model that answers as they do."""

from headrace_api.stages.base import ArtifactKind
from headrace_api.stages.finetune import OfflineFinetune, Sampled


class Sft(OfflineFinetune, Sampled):
    """Supervised fine-tuning: train on the answers of conversations, or of prompts with completions."""

    KIND = "sft"
    GIVES = ArtifactKind.CHECKPOINT

    packing: bool = True
    """packing lays several documents in one sample, each attending only to itself; without it a sample is one document."""
