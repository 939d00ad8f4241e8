"""A model that can criticize itself, taught once for all of these tests."""

import pytest

from headrace_api.artifact import ArtifactRef
from trainer.posttrain.chain import Base, pretrained, write_records
from trainer.posttrain.constitutional.critics import Json
from trainer.posttrain.constitutional.stages import SFT, done, stage
from trainer.posttrain.constitutional.synthetic import demonstrations


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def taught(base: Base, tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    """A model that answers, swears half of the time, and can say and mend that."""
    folder = tmp_path_factory.mktemp("taught")
    data = write_records(folder / "demonstrations.jsonl", demonstrations(2400))
    block: Json = SFT | {
        "from": {"model": "base"},
        "data": {"sources": [{"uri": str(data)}]},
        "epochs": 4,
        "schedule": {"learningRate": 4e-3, "warmup": 20},
    }
    return done(stage(base, folder, "taught", {"sft": block}, model=base.model), folder)
