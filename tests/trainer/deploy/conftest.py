"""The model, made and committed once."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from headrace_api.artifact import ArtifactRef
from trainer.deploy.builders import Deployment, commit_model


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A committed model, its files, and the storage that it is in."""

    ref: ArtifactRef
    files: Path
    storage: Path


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return Exported(ref=commit_model(folder), files=folder / "model", storage=folder / "storage")


@pytest.fixture
def deploy(exported, tmp_path):
    """Start deployments that end with the test."""
    started: list[Deployment] = []

    def start(**options) -> Deployment:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Deployment(folder, exported.storage, exported.ref, **options))
        return started[-1]

    yield start
    for deployment in started:
        deployment.end()
