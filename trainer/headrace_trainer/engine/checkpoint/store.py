"""The checkpoints of one stage as they lie in storage: names, manifests, commit and removal. One rank at a time.

In: a store and the folder below which checkpoints are. Out: what is committed there, newest first. ``checkpointer`` makes a
gang of ranks use it.
"""

import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime

from pydantic import ValidationError

from headrace_trainer.engine.checkpoint.choice import Training
from headrace_trainer.engine.checkpoint.manifest import (
    CORRUPT_FILE,
    MANIFEST_FILE,
    CheckpointManifest,
    attempt_of,
    folder_name,
    newest_first,
    step_of,
)
from headrace_trainer.errors import StorageError
from headrace_trainer.storage import ObjectStore

log = logging.getLogger("headrace")


class CheckpointStore:
    """Checkpoints below ``root`` of a store.

    Args:
        store: the run's store.
        root: the key of their folder, without a slash at its end.
    """

    def __init__(self, store: ObjectStore, root: str) -> None:
        self.store, self.root = store, root
        self._taken: set[str] | None = None

    def key(self, name: str, path: str) -> str:
        """The key of a file of a checkpoint."""
        return f"{self.root}/{name}/{path}"

    def uri(self, name: str) -> str:
        """The address of a checkpoint, for people."""
        return f"{self.store.uri}/{self.root}/{name}"

    def new_name(self, step: int, attempt: int) -> str:
        """A folder name that nothing was ever stored under. Storage is asked once: nobody else makes names in this attempt."""
        if self._taken is None:
            self._taken = _folders(self._paths())
        name = folder_name(step, attempt, taken=self._taken)
        self._taken.add(name)
        return name

    def committed(self) -> list[str]:
        """Names of the folders with a manifest: the newest first, and those that could not be loaded once after all others."""
        paths = self._paths()
        marked = _with_file(paths, CORRUPT_FILE)
        return sorted(newest_first(_with_file(paths, MANIFEST_FILE)), key=lambda name: name in marked)

    def read_manifest(self, name: str) -> CheckpointManifest | None:
        """The manifest, or None where it is damaged or a file that it lists is missing or cut short."""
        text = self.store.get_bytes(self.key(name, MANIFEST_FILE))
        try:
            manifest = CheckpointManifest.model_validate_json(text)
        except ValidationError:
            return None
        sizes = {info.key: info.bytes for info in self.store.list(self.key(name, ""))}
        return manifest if all(sizes.get(self.key(name, f.path)) == f.bytes for f in manifest.files) else None

    def commit(self, name: str, manifest: CheckpointManifest, *, keep: int, protect: int | None = None) -> None:
        """Store the manifest, which makes the checkpoint exist; then remove what is older than the newest ``keep``.

        Args:
            name: the checkpoint's folder.
            manifest: what it holds.
            keep: how many stay.
            protect: a step whose newest whole checkpoint stays besides.

        Raises:
            StorageError: a file is not there, or not as long as it was when it was sent.
        """
        text = manifest.model_dump_json(by_alias=True, indent=1)
        self.store.put_bytes(self.key(name, MANIFEST_FILE), text.encode())
        if self.read_manifest(name) is None:
            raise StorageError(f"{self.uri(name)}: not whole though it was just stored: check the storage's health")
        try:
            self._prune(newest=name, keep=keep, protect=protect)
        except StorageError as error:
            # The work is saved: too many copies of it are no reason to end the run.
            log.warning("old checkpoints could not be removed: %s", error)

    def mark_corrupt(self, name: str, reason: str) -> None:
        """Note beside a checkpoint why it could not be loaded: it is tried last from now on, and keeps no place of a good one.

        It is not removed: what failed may have been the node.
        """
        log.warning("checkpoint %s is passed over: %s", self.uri(name), reason)
        note = json.dumps({"reason": reason, "time": datetime.now(UTC).isoformat()})
        try:
            self.store.put_bytes(self.key(name, CORRUPT_FILE), note.encode())
        except StorageError as error:
            log.warning("that could not be noted in storage: %s", error)

    def _prune(self, *, newest: str, keep: int, protect: int | None) -> None:
        """Remove what is older than the newest ``keep`` whole checkpoints, and older ones that were never finished.

        What a later attempt has stored is left alone: this one may be a node that was taken for dead.
        """
        paths = self._paths()
        committed, marked = _with_file(paths, MANIFEST_FILE), _with_file(paths, CORRUPT_FILE)
        kept = 0
        for name in newest_first(_folders(paths)):
            if step_of(name) > step_of(newest) or attempt_of(name) > attempt_of(newest):
                continue
            needed = kept < keep or step_of(name) == protect
            if not needed or name not in committed:
                # The manifest goes first: what is half removed is no longer committed.
                self.store.delete(self.key(name, MANIFEST_FILE))
                self.store.delete(self.key(name, ""))
            elif name not in marked and self.read_manifest(name) is not None:
                kept += kept < keep
                protect = None if step_of(name) == protect else protect

    def _paths(self) -> list[str]:
        prefix = f"{self.root}/"
        return [info.key.removeprefix(prefix) for info in self.store.list(prefix)]


def find_trainings(store: ObjectStore, root: str) -> list[Training]:
    """What lies below the folder of a stage's checkpoints: each folder of a training with a checkpoint that can be read."""
    prefix = f"{root}/"
    folders = _folders(info.key.removeprefix(prefix) for info in store.list(prefix))
    found = []
    for folder in sorted(folders):
        checkpoints = CheckpointStore(store, f"{root}/{folder}")
        manifests = (checkpoints.read_manifest(name) for name in checkpoints.committed())
        newest = next(filter(None, manifests), None)
        if newest is not None:
            found.append(Training(folder=folder, newest=newest))
    return found


def _folders(paths: Iterable[str]) -> set[str]:
    return {path.partition("/")[0] for path in paths}


def _with_file(paths: Iterable[str], file: str) -> set[str]:
    """The folders that hold a file of this name."""
    return {path.removesuffix(f"/{file}") for path in paths if path.endswith(f"/{file}")}
