"""Committing checkpoints to storage, and resuming from the newest one that is whole: what the gang does together.

In: a training state at a step. Out: ``<stage>/checkpoints/<identity>/<step>/`` in the run's store: the files, uploaded by
the ranks that wrote them, then the manifest. What has no manifest was never finished, and is never read.
"""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace_api.artifact import ArtifactFile, canonical_digest
from headrace_api.run import SavedCheckpoint
from headrace_api.stages.training import Checkpointing
from headrace_trainer import board
from headrace_trainer.engine.checkpoint.choice import Choice, choose
from headrace_trainer.engine.checkpoint.files import CheckpointFiles
from headrace_trainer.engine.checkpoint.manifest import Axes, CheckpointManifest, step_of
from headrace_trainer.engine.checkpoint.saving import Saving
from headrace_trainer.engine.checkpoint.state import StateWriter, TrainState, is_own_file, load_state
from headrace_trainer.engine.checkpoint.store import CheckpointStore, find_trainings
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.errors import StorageError, UserError
from headrace_trainer.storage import ObjectStore

_REASON_CHARACTERS = 300
_POLL_SECONDS = 0.05

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

    A save goes on while training does: ``save`` begins it, and ``advance`` takes it further once every rank is ``ready``.

    Args:
        state: weights and optimizer: what is saved and loaded.
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
        state: TrainState,
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
        self._state, self._store, self._scratch, self._gang = state, store, scratch, gang
        self._stage, self._identity, self._attempt, self._steps = stage, identity, attempt, steps
        self._settings = settings
        self._root = f"{stage}/checkpoints"
        self._checkpoints = CheckpointStore(store, f"{self._root}/{canonical_digest(identity)[:12]}")
        self._writer = StateWriter(state)
        self._saving: tuple[str, Saving] | None = None

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is on its way; the same on every rank."""
        return self._saving is not None

    @property
    def ready(self) -> bool:
        """Whether this rank has done its part of what the checkpoint on its way waits for."""
        return self._saving is not None and self._saving[1].ready

    def save(
        self,
        *,
        step: int,
        consumed_samples: int,
        extras: Callable[[], dict[str, str]],
        steps: int | None = None,
        protect: int | None = None,
    ) -> None:
        """Begin a checkpoint of the state as it is now. The one before it must have been finished.

        Args:
            step: optimizer steps done.
            consumed_samples: number of the next sample.
            steps: the run's last step, where it has become another.
            protect: a step whose checkpoint stays in storage, however many come after it.
            extras: gives small text files to go with it, name -> content; called in a fork of rank 0.

        Raises:
            StorageError: on every rank, where the scratch folder cannot be written or storage does not answer.
        """
        assert self._saving is None
        name = self._gang.from_first(lambda: self._checkpoints.new_name(step, self._attempt))
        staged = self._scratch / "checkpoints" / name
        self._gang.together(lambda: staged.mkdir(parents=True, exist_ok=True))
        saving = Saving(
            name=name,
            staged=staged,
            write=self._writer.begin(staged),
            extras=extras,
            describe=functools.partial(self._describe, step, consumed_samples, steps or self._steps),
            checkpoints=self._checkpoints,
            keep=self._settings.keep,
            protect=protect,
            gang=self._gang,
        )
        self._saving = name, saving

    def advance(self) -> SavedCheckpoint | None:
        """Take the checkpoint on its way further; waits for ranks that are not ``ready``.

        Returns:
            The checkpoint, once it is committed.

        Raises:
            StorageError: on every rank, where any could not write or upload; nothing is on its way then.
        """
        assert self._saving is not None
        (name, saving), self._saving = self._saving, None
        manifest = saving.advance()
        if manifest is None:
            self._saving = name, saving
            return None
        return self._saved(name, manifest)

    def finish(self) -> SavedCheckpoint | None:
        """Wait until the checkpoint on its way is committed.

        Returns:
            The checkpoint; None where none was on its way.

        Raises:
            StorageError: on every rank, where any could not write or upload.
        """
        saved = None
        while self.is_saving:
            self._wait_until_ready()
            saved = self.advance()
        return saved

    def _wait_until_ready(self) -> None:
        """Wait for every rank's part; all beat as long as that of any moves on."""
        assert self._saving is not None
        seen, saving = -1.0, self._saving[1]
        while True:
            ready, beats = self._gang.sum([saving.ready, saving.beats])
            if ready == self._gang.layout.world:
                return
            if beats != seen:
                board.beat()
            seen = beats
            time.sleep(_POLL_SECONDS)

    def resume(self) -> Start:
        """Load the newest checkpoint that fits and can be loaded; none, where none was ever committed.

        Raises:
            StorageError: checkpoints were committed, but none of them can be loaded.
            UserError: there is unfinished work that does not fit this run.
        """
        choice = self._gang.from_first(self._choose)
        if choice.refusal:
            raise UserError(choice.refusal)
        self._checkpoints = CheckpointStore(self._store, f"{self._root}/{choice.folder}")
        names = self._gang.from_first(self._checkpoints.committed)
        found, passed_over = self._load_first(names)
        if found is not None:
            return found
        if passed_over:
            name, reason = next(iter(passed_over.items()))
            raise StorageError(
                f"{self._store.uri}/{self._checkpoints.root}: none of the {len(passed_over)} committed checkpoints can be loaded "
                f"({name}: {reason}): restore one from a backup, or remove the folder to begin again"
            )
        if choice.message and self._gang.is_first:
            log.warning(choice.message)
        return Start(message=choice.message)

    def restore(self, *, before: int) -> SavedCheckpoint | None:
        """Load the newest checkpoint of this training that was made before a step.

        Returns:
            What was loaded; None where there is none.
        """
        names = self._gang.from_first(self._checkpoints.committed)
        found, _ = self._load_first([name for name in names if step_of(name) < before])
        return None if found is None else found.saved

    def restore_at(self, step: int) -> SavedCheckpoint | None:
        """Load a checkpoint of this training that was made after a step.

        Returns:
            What was loaded; None where there is none that can be.
        """
        names = self._gang.from_first(self._checkpoints.committed)
        found, _ = self._load_first([name for name in names if step_of(name) == step])
        return None if found is None else found.saved

    def _load_first(self, names: Sequence[str]) -> tuple[Start | None, dict[str, str]]:
        """Load the first checkpoint that can be loaded; why those before it could not."""
        passed_over: dict[str, str] = {}
        for name in names:
            found = self._load(name)
            if isinstance(found, Loaded):
                return self._started(name, found, passed_over=list(passed_over)), passed_over
            passed_over[name] = found[:_REASON_CHARACTERS]
            self._gang.from_first(functools.partial(self._checkpoints.mark_corrupt, name, passed_over[name]))
        return None, passed_over

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

    def _describe(self, step: int, consumed_samples: int, steps: int, files: list[ArtifactFile]) -> CheckpointManifest:
        return CheckpointManifest(
            stage=self._stage,
            identity=self._identity,
            attempt=self._attempt,
            step=step,
            steps=steps,
            consumed_samples=consumed_samples,
            layout=self._axes,
            created_at=datetime.now(UTC),
            files=sorted(files, key=lambda f: f.path),
        )

    @property
    def _axes(self) -> Axes:
        layout = self._gang.layout
        return Axes(tensor=layout.tensor, pipeline=layout.pipeline, data=layout.data)

    def _load(self, name: str) -> Loaded | str:
        """Load one checkpoint; on every rank the same answer: what was loaded, or what is wrong with it."""
        manifest = self._gang.from_first(lambda: self._checkpoints.read_manifest(name))
        if manifest is None:
            return "its manifest is damaged, or a file is missing or cut short"
        if manifest.identity != self._identity or manifest.step > self._steps:
            return "it is not of this training"
        files = CheckpointFiles(
            self._store, self._checkpoints.key(name, ""), manifest, scratch=self._scratch, gang=self._gang
        )
        failed = next(filter(None, self._gang.gather(load_state(self._state, files))), None)
        if failed is not None:
            return failed
        extras = {f.path for f in manifest.files if not is_own_file(f.path)}
        files.need(extras)
        loaded = Loaded(manifest=manifest, extras={path: (files.folder / path).read_text() for path in extras})
        files.remove()
        return loaded

    def _saved(self, name: str, manifest: CheckpointManifest) -> SavedCheckpoint:
        return SavedCheckpoint(step=manifest.step, uri=self._checkpoints.uri(name), time=manifest.created_at)
