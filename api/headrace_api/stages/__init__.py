"""The stage kinds, one file each. A new kind needs a file, and a line in ``KINDS``."""

from headrace_api.stages.base import ArtifactKind, Inputs, RunsAs, StageConfig
from headrace_api.stages.constitutional import Constitutional
from headrace_api.stages.corpus import Corpus
from headrace_api.stages.deploy import Deploy
from headrace_api.stages.dpo import Dpo
from headrace_api.stages.evaluate import Evaluate
from headrace_api.stages.export import Export
from headrace_api.stages.finetune import Adapter, Finetune, Lora, LoraTarget, OfflineFinetune, StartsFromModel
from headrace_api.stages.pretrain import Pretrain
from headrace_api.stages.reward import Reward
from headrace_api.stages.rl import Rl
from headrace_api.stages.sft import Sft
from headrace_api.stages.shards import Shards
from headrace_api.stages.tokenizer import Tokenizer
from headrace_api.stages.training import Training

KINDS: dict[str, type[StageConfig]] = {
    kind.KIND: kind
    for kind in (
        Corpus,
        Tokenizer,
        Shards,
        Pretrain,
        Sft,
        Reward,
        Rl,
        Dpo,
        Constitutional,
        Evaluate,
        Export,
        Deploy,
    )
}

__all__ = [
    "KINDS",
    "Adapter",
    "ArtifactKind",
    "Constitutional",
    "Corpus",
    "Deploy",
    "Dpo",
    "Evaluate",
    "Export",
    "Finetune",
    "Inputs",
    "Lora",
    "LoraTarget",
    "OfflineFinetune",
    "Pretrain",
    "Reward",
    "Rl",
    "RunsAs",
    "Sft",
    "Shards",
    "StageConfig",
    "StartsFromModel",
    "Tokenizer",
    "Training",
]
