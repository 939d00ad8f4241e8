"""A checkpoint's files on this node: only those that its ranks read, fetched and verified once for all of them.

In: a committed checkpoint. Out: a local folder that holds what was asked for. Where the store is a directory, nothing is
copied; digests are compared all the same.
"""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from headrace_api.artifact import ArtifactFile
from headrace_trainer import board
from headrace_trainer.artifacts import sha256_file
from headrace_trainer.engine.checkpoint.manifest import CheckpointManifest
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.locks import locked
from headrace_trainer.storage import ObjectStore


class Corrupt(Exception):
    """A file is not what the manifest says. Raised on every rank."""


class CheckpointFiles:
    """The files of one checkpoint. Every rank calls the same methods in the same order.

    Attributes:
        folder: where they are on this node.

    Args:
        store: the run's store.
        prefix: the key of the checkpoint's folder, with a slash at its end.
        manifest: what the files must be.
        scratch: a folder that the ranks of this node share.
        gang: this rank's place.
    """

    def __init__(
        self, store: ObjectStore, prefix: str, manifest: CheckpointManifest, *, scratch: Path, gang: Gang
    ) -> None:
        self._store, self._prefix, self._gang = store, prefix, gang
        self._expected: Mapping[str, ArtifactFile] = {f.path: f for f in manifest.files}
        self._notes = scratch / "resume" / Path(prefix).name
        local = store.local_path(prefix)
        self._is_remote = local is None
        self.folder = local or self._notes
        self._notes.mkdir(parents=True, exist_ok=True)

    def need(self, names: Collection[str]) -> None:
        """Make files of the checkpoint available to this rank.

        Raises:
            Corrupt: a file that any rank asked for is not what the manifest says.
            StorageError: storage does not answer.
        """
        wrong = [name for name in names if name not in self._expected]
        found = self._gang.together(lambda: wrong or [n for n in sorted(names) if not self._is_here(n)])
        missing = sorted({name for part in found for name in part})
        if missing:
            raise Corrupt(f"{missing[0]}: its digest is not the one in the manifest")

    def remove(self) -> None:
        """Give the space on this node back; no rank reads any more."""
        self._gang.barrier()
        if self._gang.local_rank == 0:
            shutil.rmtree(self._notes, ignore_errors=True)
        self._gang.barrier()

    def _is_here(self, name: str) -> bool:
        """Fetch a file, unless another rank of this node did; whether it is what it should be."""
        path, verified = self.folder / name, self._notes / f"{name}.verified"
        with locked(self._notes / f"{name}.lock"):
            if verified.exists():
                return True
            # Once more: what is wrong with it may have come on the way.
            for _ in range(2):
                if self._is_remote:
                    self._store.get_file(f"{self._prefix}{name}", path)
                if sha256_file(path) == self._expected[name].sha256:
                    verified.touch()
                    board.beat()
                    return True
        return False
