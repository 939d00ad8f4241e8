"""One checkpoint on its way to storage while training goes on.

First every rank writes and uploads its own files; once all have, rank 0 uploads what names them, and commits. Both are
done in forks of the ranks. The manifest is stored last, so a kill at any moment leaves the checkpoint before it, or this one.
"""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_api.artifact import ArtifactFile
from headrace_trainer import board
from headrace_trainer.artifacts import sha256_file
from headrace_trainer.engine.checkpoint.background import Background
from headrace_trainer.engine.checkpoint.manifest import CheckpointManifest
from headrace_trainer.engine.checkpoint.state import COMMITTING_FILES, Write
from headrace_trainer.engine.checkpoint.store import CheckpointStore
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.errors import StorageError


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank wrote."""

    written: list[Any]
    """What Megatron wants to know of it."""
    files: list[ArtifactFile]


class Saving:
    """Every method is called by every rank at the same step.

    Args:
        name: the checkpoint's folder in storage.
        staged: the folder of this node that the files are written to.
        write: the state to be written.
        extras: gives small text files to go with it, name -> content; called in a fork of rank 0.
        describe: the manifest, from the list of files.
        checkpoints: where it will be.
        keep: how many stay there.
        protect: a step whose checkpoint stays there besides.
        gang: this rank's place.
    """

    def __init__(
        self,
        *,
        name: str,
        staged: Path,
        write: Write,
        extras: Callable[[], dict[str, str]],
        describe: Callable[[list[ArtifactFile]], CheckpointManifest],
        checkpoints: CheckpointStore,
        keep: int,
        protect: int | None,
        gang: Gang,
    ) -> None:
        self._name, self._staged, self._write, self._extras = name, staged, write, extras
        self._describe, self._checkpoints, self._gang = describe, checkpoints, gang
        self._keep, self._protect = keep, protect
        self._writing: Background[Share] | None = Background(self._write_and_upload, without=write.state)
        self._committing: Background[CheckpointManifest | None] | None = None
        write.let_go()

    @property
    def ready(self) -> bool:
        """Whether this rank has done its part of what is to be done now."""
        return self._work is None or self._work.is_done

    @property
    def beats(self) -> int:
        """Grows while this rank's part of it moves on."""
        return 0 if self._work is None else self._work.beats

    @property
    def _work(self) -> Background[Share] | Background[CheckpointManifest | None] | None:
        return self._writing or self._committing

    def advance(self) -> CheckpointManifest | None:
        """Go on to what is next; waits for ranks that are not ``ready``.

        Returns:
            The manifest, once it is committed.

        Raises:
            StorageError: on every rank, where any could not write or upload.
        """
        try:
            return self._advance()
        except StorageError:
            # Every rank's part has ended; the space that it took may be what is missing.
            if self._gang.local_rank == 0:
                shutil.rmtree(self._staged, ignore_errors=True)
            raise

    def _advance(self) -> CheckpointManifest | None:
        writing, committing = self._writing, self._committing
        if writing is None:
            return self._gang.together(lambda: None if committing is None else committing.result())[0]
        shares = self._gang.together(writing.result)
        self._writing = None
        if self._gang.local_rank == 0:
            work = functools.partial(self._commit, shares)
            self._committing = Background(work, without=self._write.state)
        return None

    def _write_and_upload(self) -> Share:
        """In a fork of each rank: write its file and upload it, with what rank 0 has to say."""
        written = self._write.write()
        board.beat()
        if self._gang.is_first:
            for name, text in self._extras().items():
                (self._staged / name).write_text(text)
        mine = [path for path in sorted(self._staged.iterdir()) if self._is_mine(path)]
        return Share(written=written, files=[self._upload(path) for path in mine])

    def _is_mine(self, path: Path) -> bool:
        if path.suffix == ".distcp":
            return path.name.startswith(f"__{self._gang.rank}_")
        return self._gang.is_first

    def _upload(self, path: Path) -> ArtifactFile:
        file = ArtifactFile(path=path.name, bytes=path.stat().st_size, sha256=sha256_file(path))
        board.beat()
        self._checkpoints.store.put_file(self._checkpoints.key(self._name, path.name), path)
        return file

    def _commit(self, shares: list[Share]) -> CheckpointManifest | None:
        """In a fork of rank 0: upload what makes the files a checkpoint, then the manifest. On each node: tidy up."""
        manifest = None
        if self._gang.is_first:
            self._write.finish([share.written for share in shares])
            files = [file for share in shares for file in share.files]
            manifest = self._describe(files + [self._upload(self._staged / name) for name in COMMITTING_FILES])
            self._checkpoints.commit(self._name, manifest, keep=self._keep, protect=self._protect)
        shutil.rmtree(self._staged, ignore_errors=True)
        return manifest
