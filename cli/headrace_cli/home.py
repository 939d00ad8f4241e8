"""Where a local run keeps its state: ``<home>/runs/<name>/``.

``manifest.yaml`` what was asked for; ``status.json`` what the custom resource's ``.status`` would hold; ``attempts/``
one folder an attempt; ``artifacts/`` the storage, unless the manifest names another.
"""

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from headrace_api.artifact import ARTIFACT_FILE, Artifact
from headrace_api.errors import parse_run
from headrace_api.run import RunStatus, StageState, StageStatus, TrainingRun, as_object


class Busy(Exception):
    """Another process works on the run."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The state of one local run."""

    path: Path

    @property
    def attempts(self) -> Path:
        """One folder an attempt, named ``<stage>-<number>``."""
        return self.path / "attempts"

    @property
    def artifacts(self) -> Path:
        """The storage of a manifest that names none."""
        return self.path / "artifacts"

    def exists(self) -> bool:
        """Whether the run was ever started here."""
        return (self.path / "manifest.yaml").exists()

    def load(self) -> TrainingRun:
        """The run as it was last started, with its status."""
        run = parse_run(yaml.safe_load((self.path / "manifest.yaml").read_text()))
        return run.model_copy(update={"status": self.status()})

    def save_manifest(self, run: TrainingRun) -> None:
        """Keep what was asked for."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / "manifest.yaml", yaml.safe_dump(as_object(run), sort_keys=False))

    def status(self) -> RunStatus:
        """The newest status; an empty one before the first."""
        try:
            return RunStatus.model_validate_json((self.path / "status.json").read_text())
        except (FileNotFoundError, ValidationError):
            return RunStatus()

    def save_status(self, status: RunStatus) -> None:
        """Replace the status."""
        _write(self.path / "status.json", json.dumps(status.dump(), indent=1) + "\n")

    def uid(self) -> str:
        """An identity that lasts as long as the folder."""
        file = self.path / "uid"
        if not file.exists():
            _write(file, str(uuid.uuid4()))
        return file.read_text()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            Busy: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Busy(f"{self.path.name}: another headrace process is running it") from error
            yield


def run_folder(home: Path, name: str) -> RunFolder:
    """The folder of a run of this name."""
    return RunFolder(path=home.absolute() / "runs" / name)


def forget_missing_artifacts(run: TrainingRun) -> TrainingRun:
    """The run without the results that are no longer in its storage, so that their stages run again.

    Only a directory is looked at; what is in S3 is verified by the stage that reads it.
    """
    stages = [s if _is_there(s) else StageStatus(name=s.name, attempt=s.attempt) for s in run.status.stages]
    return run.model_copy(update={"status": run.status.model_copy(update={"stages": stages})})


def _is_there(status: StageStatus) -> bool:
    if status.state is not StageState.SUCCEEDED or status.artifact is None or "://" in status.artifact.uri:
        return True
    try:
        text = (Path(status.artifact.uri) / ARTIFACT_FILE).read_text()
        return Artifact.model_validate_json(text).digest == status.artifact.digest
    except (OSError, ValidationError):
        return False


def _write(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(text)
    staged.replace(path)
