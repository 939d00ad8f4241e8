"""Committing checkpoints to storage, and resuming from the newest one that is whole: what the gang does together.

In: a training state at a step. Out: ``<stage>/checkpoints/<identity>/<step>/`` in the run's store: the files, uploaded by
the ranks that wrote them, then the manifest. What has no manifest was never finished, and is never read.
"""

import functools
import logging
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace_api.artifact import ArtifactFile, canonical_digest
from headrace_api.contract import SavedCheckpoint
from headrace_api.stages.pretrain import Checkpointing
from headrace_trainer.artifacts import sha256_file
from headrace_trainer.engine.checkpoint.choice import Choice, choose
from headrace_trainer.engine.checkpoint.manifest import Axes, CheckpointManifest
from headrace_trainer.engine.checkpoint.state import TrainState, is_own_file, load_state, save_state
from headrace_trainer.engine.checkpoint.store import CheckpointStore, find_trainings
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.errors import StorageError, UserError
from headrace_trainer.storage import ObjectStore

_REASON_CHARACTERS = 300

log = logging.getLogger("headrace")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where training starts."""

    saved: SavedCheckpoint | None = None
    """The checkpoint that was loaded; None at step 0, with the weights that the model had."""
    consumed_samples: int = 0
    extras: dict[str, str] = field(default_factory=dict)
    """The text files that were given to ``save``, name -> content."""
    message: str = ""
    """What people should know of it."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a checkpoint said of itself, once its tensors were in place."""

    manifest: CheckpointManifest
    extras: dict[str, str]


class Checkpointer:
    """The checkpoints of one stage. Every method is called by every rank at the same step.

    Args:
        store: the run's store.
        scratch: a folder that the ranks of a node share, for files on their way.
        gang: this rank's place.
        stage: the stage's name.
        identity: the stage's ``resume_identity``.
        attempt: the attempt's number.
        steps: the run's last step.
        settings: how many are kept, and what to do with those that do not fit.
    """

    def __init__(
        self,
        *,
        store: ObjectStore,
        scratch: Path,
        gang: Gang,
        stage: str,
        identity: dict[str, Any],
        attempt: int,
        steps: int,
        settings: Checkpointing,
    ) -> None:
        self._store, self._scratch, self._gang = store, scratch, gang
        self._stage, self._identity, self._attempt, self._steps = stage, identity, attempt, steps
        self._settings = settings
        self._root = f"{stage}/checkpoints"
        self._checkpoints = CheckpointStore(store, f"{self._root}/{canonical_digest(identity)[:12]}")

    def save(
        self, state: TrainState, *, step: int, consumed_samples: int, extras: dict[str, str] | None = None
    ) -> SavedCheckpoint:
        """Write, upload and commit a checkpoint, then remove the ones that are too many.

        Args:
            state: weights and optimizer.
            step: optimizer steps done.
            consumed_samples: number of the next sample.
            extras: small text files to go with it, name -> content; rank 0's are taken.

        Raises:
            StorageError: on every rank, where any could not write or upload.
        """
        name = self._gang.from_first(lambda: self._checkpoints.new_name(step, self._attempt))
        staged = self._scratch / "checkpoints" / name
        self._remove(staged)
        save_state(state, staged)
        files = self._gang.together(lambda: self._upload(staged, name, extras or {}))
        manifest = self._describe(step, consumed_samples, [f for part in files for f in part])
        self._gang.from_first(lambda: self._checkpoints.commit(name, manifest, keep=self._settings.keep))
        self._remove(staged)
        return self._saved(name, manifest)

    def resume(self, state: TrainState) -> Start:
        """Load the newest checkpoint that fits and can be loaded into ``state``; none, where none was ever committed.

        Raises:
            StorageError: checkpoints were committed, but none of them can be loaded.
            UserError: there is unfinished work that does not fit this run.
        """
        choice = self._gang.from_first(self._choose)
        if choice.refusal:
            raise UserError(choice.refusal)
        self._checkpoints = CheckpointStore(self._store, f"{self._root}/{choice.folder}")
        passed_over: dict[str, str] = {}
        for name in self._gang.from_first(self._checkpoints.committed):
            found = self._load(state, name)
            if isinstance(found, Loaded):
                return self._started(name, found, passed_over=list(passed_over))
            passed_over[name] = found[:_REASON_CHARACTERS]
            self._gang.from_first(functools.partial(self._checkpoints.mark_corrupt, name, passed_over[name]))
        if passed_over:
            name, reason = next(iter(passed_over.items()))
            raise StorageError(
                f"{self._store.uri}/{self._checkpoints.root}: none of the {len(passed_over)} committed checkpoints can be loaded "
                f"({name}: {reason}): restore one from a backup, or remove the folder to begin again"
            )
        if choice.message and self._gang.is_first:
            log.warning(choice.message)
        return Start(message=choice.message)

    def _choose(self) -> Choice:
        return choose(
            self._identity,
            find_trainings(self._store, self._root),
            steps=self._steps,
            on_mismatch=self._settings.on_mismatch,
        )

    def _started(self, name: str, found: Loaded, *, passed_over: list[str]) -> Start:
        manifest = found.manifest
        message = f"resumed after step {manifest.step}"
        if manifest.layout != self._axes:
            axes = manifest.layout
            message += f", saved as tensor {axes.tensor} x pipeline {axes.pipeline} x data {axes.data}"
        if passed_over:
            message += f"; could not load {', '.join(passed_over)}"
        return Start(
            saved=self._saved(name, manifest),
            consumed_samples=manifest.consumed_samples,
            extras=found.extras,
            message=message,
        )

    def _upload(self, staged: Path, name: str, extras: dict[str, str]) -> list[ArtifactFile]:
        """Upload what this rank wrote; the size and digest of each file."""
        if self._gang.is_first:
            for extra, text in extras.items():
                (staged / extra).write_text(text)
        files = []
        for path in sorted(p for p in staged.iterdir() if self._is_mine(p)):
            files.append(ArtifactFile(path=path.name, bytes=path.stat().st_size, sha256=sha256_file(path)))
            self._store.put_file(self._checkpoints.key(name, path.name), path)
        return files

    def _is_mine(self, path: Path) -> bool:
        if path.suffix == ".distcp":
            return path.name.startswith(f"__{self._gang.rank}_")
        return self._gang.is_first

    def _describe(self, step: int, consumed_samples: int, files: list[ArtifactFile]) -> CheckpointManifest:
        return CheckpointManifest(
            stage=self._stage,
            identity=self._identity,
            attempt=self._attempt,
            step=step,
            steps=self._steps,
            consumed_samples=consumed_samples,
            layout=self._axes,
            created_at=datetime.now(UTC),
            files=sorted(files, key=lambda f: f.path),
        )

    @property
    def _axes(self) -> Axes:
        layout = self._gang.layout
        return Axes(tensor=layout.tensor, pipeline=layout.pipeline, data=layout.data)

    def _load(self, state: TrainState, name: str) -> Loaded | str:
        """Load one checkpoint; on every rank the same answer: what was loaded, or what is wrong with it."""
        manifest = self._gang.from_first(lambda: self._checkpoints.read_manifest(name))
        if manifest is None:
            return "its manifest is damaged, or a file is missing or cut short"
        if manifest.identity != self._identity or manifest.step > self._steps:
            return "it is not of this training"
        folder = self._fetch(name, manifest)
        if folder is None:
            return "a file's digest is not the one in the manifest"
        failed = next(filter(None, self._gang.gather(load_state(state, folder))), None)
        if failed is not None:
            return failed
        extras = {f.path: (folder / f.path).read_text() for f in manifest.files if not is_own_file(f.path)}
        if self._is_remote:
            self._remove(folder)
        return Loaded(manifest=manifest, extras=extras)

    def _fetch(self, name: str, manifest: CheckpointManifest) -> Path | None:
        """A folder on this node with verified files, or None on every rank where a digest does not match."""
        folder = self._store.local_path(self._checkpoints.key(name, "")) or self._scratch / "resume" / name
        whole = self._gang.together(lambda: self._fetch_share(name, manifest, folder))
        return folder if all(whole) else None

    def _fetch_share(self, name: str, manifest: CheckpointManifest, folder: Path) -> bool:
        """Fetch and verify this rank's share of the files; the ranks of a node share the work."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in manifest.files[self._gang.local_rank :: self._gang.local_world]:
            path = folder / file.path
            if self._is_remote:
                self._store.get_file(self._checkpoints.key(name, file.path), path)
            if sha256_file(path) != file.sha256:
                return False
        return True

    @property
    def _is_remote(self) -> bool:
        return self._store.local_path("") is None

    def _remove(self, folder: Path) -> None:
        """Remove a folder of this node when no rank needs it any more."""
        self._gang.barrier()
        if self._gang.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self._gang.barrier()

    def _saved(self, name: str, manifest: CheckpointManifest) -> SavedCheckpoint:
        return SavedCheckpoint(step=manifest.step, uri=self._checkpoints.uri(name), time=manifest.created_at)
