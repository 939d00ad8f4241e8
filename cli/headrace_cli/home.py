"""Where a local run keeps its state: ``<home>/runs/<name>/``.

``manifest.yaml``: the manifest, with absolute paths. ``status.json``: the custom resource's ``.status``. ``attempts/``:
a folder per attempt. ``artifacts/``: the storage, unless the manifest names another. ``lock``: held by whoever runs it.
``<home>/cache/``: inputs fetched and verified by the stages of any run.
"""

import contextlib
import fcntl
import json
import os
import shlex
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import psutil
import yaml

from headrace_api.contract import STAGE_FILE, ResolvedStage
from headrace_api.run import RunStatus, TrainingRun, as_object
from headrace_cli import records
from headrace_cli.problem import ExitCode, Problem
from headrace_cli.processes import started

HOME = Path(".headrace")
"""The default home, relative to the current folder."""
_FILE_ANNOTATION = "headrace.dev/file"


class Busy(Problem):
    """Another process is running the run."""


class Gone(Problem):
    """The run's folder was removed while this process was using it."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What every command can say about a run, even one that another version of Headrace wrote."""

    name: str
    kinds: dict[str, str] = field(default_factory=dict)
    """Stage -> kind, in order; empty if the manifest is lost."""
    file: str | None = None
    """The manifest file that the user gave."""
    uid: str | None = None
    home: Path = HOME

    @property
    def command(self) -> str:
        """The command that continues the run."""
        usual = Path(os.environ.get("HEADRACE_HOME", HOME)).resolve()
        words = ["headrace", "run", self.file or "FILE"]
        return shlex.join(words if self.home.resolve() == usual else [*words, "--home", str(self.home)])


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The state of one local run."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def attempts(self) -> Path:
        """Holds one folder per attempt, named ``<stage>-<number>``."""
        return self.path / "attempts"

    @property
    def cache(self) -> Path:
        """Cached stage inputs, shared by all runs of a home."""
        return self.path.parents[1] / "cache"

    @property
    def artifacts(self) -> Path:
        """The storage of a manifest that names none."""
        return self.path / "artifacts"

    def exists(self) -> bool:
        """Whether the run was ever started here."""
        return any((self.path / part).exists() for part in ("manifest.yaml", "status.json", "attempts"))

    def outline(self) -> Outline:
        """Name, stages and origin, from whatever can be read of ``manifest.yaml``."""
        try:
            manifest = yaml.safe_load((self.path / "manifest.yaml").read_text(encoding="utf-8"))
            metadata = manifest["metadata"]
            return Outline(
                name=self.name,
                home=self.path.parents[1],
                kinds={str(s["name"]): _kind(s) for s in manifest["spec"]["stages"]},
                file=metadata.get("annotations", {}).get(_FILE_ANNOTATION),
                uid=metadata.get("uid"),
            )
        except (FileNotFoundError, yaml.YAMLError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return Outline(name=self.name, home=self.path.parents[1])

    def uid(self) -> str:
        """An identity for the life of the folder: the manifest's uid, or if that is lost, its attempts'."""
        attempts = (records.read_if_whole(f, ResolvedStage) for f in sorted(self.attempts.glob(f"*/{STAGE_FILE}")))
        return self.outline().uid or next((a.run_uid for a in attempts if a is not None), None) or str(uuid.uuid4())

    def save_manifest(self, run: TrainingRun, *, file: Path) -> None:
        """Store the manifest, and which file it came from."""
        manifest = as_object(run)
        manifest["metadata"]["annotations"] = {_FILE_ANNOTATION: str(file.absolute())}
        records.write(self.path / "manifest.yaml", yaml.safe_dump(manifest, sort_keys=False), durable=True)

    def status(self) -> RunStatus:
        """The latest status; an empty one before the first.

        Raises:
            Damaged: ``status.json`` is unreadable.
        """
        return records.read(self.path / "status.json", RunStatus) or RunStatus()

    def status_if_whole(self) -> RunStatus:
        """The latest status; an empty one if it is missing or damaged."""
        return records.read_if_whole(self.path / "status.json", RunStatus) or RunStatus()

    def save_status(self, status: RunStatus, *, durable: bool) -> None:
        records.write(self.path / "status.json", json.dumps(status.dump(), indent=1) + "\n", durable=durable)

    def begun_at(self) -> datetime | None:
        """When the run was last started."""
        try:
            return datetime.fromtimestamp((self.path / "manifest.yaml").stat().st_mtime, UTC)
        except FileNotFoundError:
            return None

    @contextmanager
    def locked(self) -> Iterator["Lock"]:
        """Lock the run for this process.

        Raises:
            Busy: another process holds the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise self._busy() from error
            lock = Lock(folder=self, file=file)
            lock.sign(f"{os.getpid()} {started(psutil.Process())}")
            try:
                yield lock
            finally:
                lock.sign("")

    def holder(self) -> psutil.Process | None:
        """The process that holds the lock."""
        try:
            pid, when = (self.path / "lock").read_text().split()
            process = psutil.Process(int(pid))
            return process if started(process) == when and process.status() != psutil.STATUS_ZOMBIE else None
        except (FileNotFoundError, ValueError, psutil.Error):
            return None

    def _busy(self) -> Busy:
        holder = self.holder()
        who = f"process {holder.pid}" if holder is not None else "a process not visible from here"
        return Busy(f"{self.name}: another headrace process is running it, {who}; headrace stop {self.name} stops it")


@dataclass(frozen=True, kw_only=True)
class Lock:
    """A lock held by this process."""

    folder: RunFolder
    file: IO[bytes]

    def check(self) -> None:
        """Check that the folder is still the one that was locked.

        Raises:
            Gone: it was removed; another process may hold a new one.
        """
        try:
            same = os.path.samestat(os.fstat(self.file.fileno()), (self.folder.path / "lock").stat())
        except FileNotFoundError:
            same = False
        if not same:
            said = f"{self.folder.path}: removed while the run was using it; its processes were stopped"
            raise Gone(said, code=ExitCode.FAILED)

    def sign(self, text: str) -> None:
        """Record who holds the lock. On a full disk that fails silently; the lock still holds."""
        with contextlib.suppress(OSError):
            os.ftruncate(self.file.fileno(), 0)
            os.pwrite(self.file.fileno(), text.encode(), 0)


def run_folder(home: Path, name: str) -> RunFolder:
    return RunFolder(path=home.resolve() / "runs" / name)


def run_folders(home: Path) -> list[RunFolder]:
    """All runs in a home, newest first."""
    try:
        paths = list((home.resolve() / "runs").iterdir())
    except FileNotFoundError:
        return []
    found = [f for path in paths if (f := RunFolder(path=path)).exists()]
    earliest = datetime.fromtimestamp(0, UTC)
    return sorted(found, key=lambda f: f.begun_at() or earliest, reverse=True)


def _kind(stage: dict[str, Any]) -> str:
    """A stage's kind as written, even one unknown to this version."""
    return next((str(key) for key in stage if key not in ("name", "compute")), "?")
