"""The stage kinds, one file each. A new kind needs a file, and a line in ``KINDS``."""

from headrace_api.stages.base import ArtifactKind, Inputs, RunsAs, StageConfig
from headrace_api.stages.corpus import Corpus
from headrace_api.stages.deploy import Deploy
from headrace_api.stages.evaluate import Evaluate
from headrace_api.stages.export import Export
from headrace_api.stages.pretrain import Pretrain
from headrace_api.stages.shards import Shards
from headrace_api.stages.tokenizer import Tokenizer

KINDS: dict[str, type[StageConfig]] = {
    kind.KIND: kind for kind in (Corpus, Tokenizer, Shards, Pretrain, Evaluate, Export, Deploy)
}

__all__ = [
    "KINDS",
    "ArtifactKind",
    "Corpus",
    "Deploy",
    "Evaluate",
    "Export",
    "Inputs",
    "Pretrain",
    "RunsAs",
    "Shards",
    "StageConfig",
    "Tokenizer",
]
