"""Committing checkpoints to storage, and finding the newest one that is whole.

In: a training state at a step. Out: ``<stage>/checkpoints/<hash>/<folder>/`` in the run's store: the files, uploaded by
the ranks that wrote them, then the manifest. What has no manifest was never finished, and is never read.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from headrace_api.artifact import ArtifactFile
from headrace_api.contract import SavedCheckpoint
from headrace_api.stages.pretrain import Precision
from headrace_trainer.artifacts import sha256_file
from headrace_trainer.checkpoint.manifest import (
    MANIFEST_FILE,
    Axes,
    CheckpointManifest,
    folder_name,
    newest_first,
    step_of,
)
from headrace_trainer.checkpoint.state import TrainState, load_state, save_state
from headrace_trainer.errors import StorageError, UserError
from headrace_trainer.parallel import Gang
from headrace_trainer.storage import ObjectStore

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a checkpoint must agree with to be resumed from."""

    stage: str
    hash: str
    seed: int
    shards_digest: str
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A checkpoint that was loaded."""

    saved: SavedCheckpoint
    consumed_samples: int
    extras: Path
    """Local folder with the files that were given to ``save``."""


class Vault:
    """The checkpoints of one stage. Every method is called by every rank at the same step.

    Args:
        store: the run's store.
        scratch: a folder that the ranks of a node share, for files on their way.
        gang: this rank's place.
        identity: what the stage is.
        attempt: the attempt's number.
        keep: committed checkpoints that stay in storage.
        tell: says one line to people.
    """

    def __init__(
        self,
        *,
        store: ObjectStore,
        scratch: Path,
        gang: Gang,
        identity: Identity,
        attempt: int,
        keep: int,
        tell: Tell,
    ) -> None:
        self._store, self._scratch, self._gang, self._tell = store, scratch, gang, tell
        self._identity, self._attempt, self._keep = identity, attempt, keep
        self._root = f"{identity.stage}/checkpoints/{identity.hash[:12]}"

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
        name = self._gang.from_first(lambda: folder_name(step, self._attempt, taken=self._folders()))
        staged = self._scratch / "checkpoints" / name
        save_state(state, staged)
        files = self._gang.together(lambda: self._upload(staged, name, extras or {}))
        manifest = self._manifest(step, consumed_samples, [f for part in files for f in part])
        self._gang.from_first(lambda: self._commit(name, manifest))
        if self._gang.local_rank == 0:
            shutil.rmtree(staged, ignore_errors=True)
        return self._saved(name, manifest)

    def resume(self, state: TrainState) -> Resumed | None:
        """Load the newest committed checkpoint that is whole into ``state``.

        Returns:
            What was loaded, or None where nothing was ever committed.

        Raises:
            StorageError: checkpoints were committed, but none of them is whole.
            UserError: the newest was made with another seed, other shards or another precision.
        """
        names = self._gang.from_first(self._committed)
        for name in names:
            manifest = self._gang.from_first(lambda name=name: self._read_manifest(name))  # type: ignore[misc]
            folder = self._fetch(name, manifest) if manifest is not None else None
            if manifest is None or folder is None:
                self._tell(f"checkpoint {name} is corrupt: taking an older one")
                continue
            self._check(name, manifest)
            load_state(state, folder)
            saved = self._saved(name, manifest)
            return Resumed(saved=saved, consumed_samples=manifest.consumed_samples, extras=folder)
        if names:
            raise StorageError(
                f"{self._store.uri}/{self._root}: all {len(names)} committed checkpoints are corrupt: restore one from "
                "a backup, or remove the folder to begin again"
            )
        return None

    # Writing

    def _upload(self, staged: Path, name: str, extras: dict[str, str]) -> list[ArtifactFile]:
        """Upload what this rank wrote; the size and digest of each file."""
        if self._gang.is_first:
            for extra, text in extras.items():
                (staged / extra).write_text(text)
        files = []
        for path in sorted(p for p in staged.iterdir() if self._is_mine(p)):
            files.append(ArtifactFile(path=path.name, bytes=path.stat().st_size, sha256=sha256_file(path)))
            self._store.put_file(f"{self._root}/{name}/{path.name}", path)
        return files

    def _is_mine(self, path: Path) -> bool:
        if path.suffix == ".distcp":
            return path.name.startswith(f"__{self._gang.rank}_")
        return self._gang.is_first

    def _manifest(self, step: int, consumed_samples: int, files: list[ArtifactFile]) -> CheckpointManifest:
        axes, identity = self._gang.layout, self._identity
        return CheckpointManifest(
            stage=identity.stage,
            hash=identity.hash,
            attempt=self._attempt,
            step=step,
            consumed_samples=consumed_samples,
            seed=identity.seed,
            shards_digest=identity.shards_digest,
            precision=identity.precision,
            layout=Axes(tensor=axes.tensor, pipeline=axes.pipeline, data=axes.data),
            created_at=datetime.now(UTC),
            files=sorted(files, key=lambda f: f.path),
        )

    def _commit(self, name: str, manifest: CheckpointManifest) -> None:
        text = manifest.model_dump_json(by_alias=True, indent=1)
        self._store.put_bytes(f"{self._root}/{name}/{MANIFEST_FILE}", text.encode())
        self._prune(newest=name)

    def _prune(self, *, newest: str) -> None:
        """Remove committed checkpoints beyond ``keep``, and what was begun and never finished."""
        kept = {newest, *self._committed()[: self._keep]}
        for name in newest_first(self._folders()):
            if name not in kept and step_of(name) <= step_of(newest):
                # The manifest goes first: what is half removed is no longer committed.
                self._store.delete(f"{self._root}/{name}/{MANIFEST_FILE}")
                self._store.delete(f"{self._root}/{name}/")

    def _saved(self, name: str, manifest: CheckpointManifest) -> SavedCheckpoint:
        uri = f"{self._store.uri}/{self._root}/{name}"
        return SavedCheckpoint(step=manifest.step, uri=uri, time=manifest.created_at)

    # Finding

    def _folders(self) -> set[str]:
        keys = (info.key.removeprefix(f"{self._root}/") for info in self._store.list(f"{self._root}/"))
        return {key.partition("/")[0] for key in keys}

    def _committed(self) -> list[str]:
        keys = (info.key.removeprefix(f"{self._root}/") for info in self._store.list(f"{self._root}/"))
        return newest_first(key.removesuffix(f"/{MANIFEST_FILE}") for key in keys if key.endswith(f"/{MANIFEST_FILE}"))

    def _read_manifest(self, name: str) -> CheckpointManifest | None:
        """The manifest, or None where it is damaged or a file that it lists is missing or cut short."""
        try:
            manifest = CheckpointManifest.model_validate_json(
                self._store.get_bytes(f"{self._root}/{name}/{MANIFEST_FILE}")
            )
        except ValidationError:
            return None
        prefix = f"{self._root}/{name}/"
        sizes = {info.key.removeprefix(prefix): info.bytes for info in self._store.list(prefix)}
        return manifest if all(sizes.get(f.path) == f.bytes for f in manifest.files) else None

    def _fetch(self, name: str, manifest: CheckpointManifest) -> Path | None:
        """A folder on this node with verified files, or None on every rank where a digest does not match."""
        folder = self._store.local_path(f"{self._root}/{name}") or self._scratch / "resume" / name
        whole = self._gang.together(lambda: self._fetch_share(name, manifest, folder))
        return folder if all(whole) else None

    def _fetch_share(self, name: str, manifest: CheckpointManifest, folder: Path) -> bool:
        """Fetch and verify this rank's share of the files; the ranks of a node share the work."""
        folder.mkdir(parents=True, exist_ok=True)
        remote = self._store.local_path("") is None
        for file in manifest.files[self._gang.local_rank :: self._gang.local_world]:
            path = folder / file.path
            if remote:
                self._store.get_file(f"{self._root}/{name}/{file.path}", path)
            if sha256_file(path) != file.sha256:
                return False
        return True

    def _check(self, name: str, manifest: CheckpointManifest) -> None:
        for field in ("seed", "shards_digest", "precision"):
            found, wanted = getattr(manifest, field), getattr(self._identity, field)
            if found != wanted:
                raise UserError(
                    f"checkpoint {self._root}/{name}: {field} is {found!r}, this run has {wanted!r}: it belongs to "
                    "another run; use another storage.uri, or remove it to begin again"
                )
