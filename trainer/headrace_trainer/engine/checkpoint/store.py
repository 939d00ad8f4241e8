"""The checkpoints of one stage as they lie in storage: names, manifests, commit and removal. One rank at a time.

In: a store and the folder below which checkpoints are. Out: what is committed there, newest first. ``checkpointer`` makes a
gang of ranks use it.
"""

import logging

from pydantic import ValidationError

from headrace_trainer.engine.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointManifest,
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

    def key(self, name: str, path: str) -> str:
        """The key of a file of a checkpoint."""
        return f"{self.root}/{name}/{path}"

    def uri(self, name: str) -> str:
        """The address of a checkpoint, for people."""
        return f"{self.store.uri}/{self.root}/{name}"

    def new_name(self, step: int, attempt: int) -> str:
        """A folder name that nothing was ever stored under."""
        return folder_name(step, attempt, taken=self._folders())

    def committed(self) -> list[str]:
        """Names of the folders with a manifest, the newest first."""
        return newest_first(p.removesuffix(f"/{MANIFEST_FILE}") for p in self._paths() if p.endswith(MANIFEST_FILE))

    def read_manifest(self, name: str) -> CheckpointManifest | None:
        """The manifest, or None where it is damaged or a file that it lists is missing or cut short."""
        text = self.store.get_bytes(self.key(name, MANIFEST_FILE))
        try:
            manifest = CheckpointManifest.model_validate_json(text)
        except ValidationError:
            return None
        sizes = {info.key: info.bytes for info in self.store.list(self.key(name, ""))}
        return manifest if all(sizes.get(self.key(name, f.path)) == f.bytes for f in manifest.files) else None

    def commit(self, name: str, manifest: CheckpointManifest, *, keep: int) -> None:
        """Store the manifest, which makes the checkpoint exist; then remove what is older than the newest ``keep``."""
        text = manifest.model_dump_json(by_alias=True, indent=1)
        self.store.put_bytes(self.key(name, MANIFEST_FILE), text.encode())
        try:
            self._prune(newest=name, keep=keep)
        except StorageError as error:
            # The work is saved: too many copies of it are no reason to end the run.
            log.warning("old checkpoints could not be removed: %s", error)

    def _prune(self, *, newest: str, keep: int) -> None:
        """Remove committed checkpoints beyond ``keep``, and older ones that were begun and never finished."""
        kept = {newest, *self.committed()[:keep]}
        for name in newest_first(self._folders()):
            if name not in kept and step_of(name) <= step_of(newest):
                # The manifest goes first: what is half removed is no longer committed.
                self.store.delete(self.key(name, MANIFEST_FILE))
                self.store.delete(self.key(name, ""))

    def _paths(self) -> list[str]:
        prefix = f"{self.root}/"
        return [info.key.removeprefix(prefix) for info in self.store.list(prefix)]

    def _folders(self) -> set[str]:
        return {path.partition("/")[0] for path in self._paths()}
