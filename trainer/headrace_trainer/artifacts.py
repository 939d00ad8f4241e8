"""Finding, verifying and committing artifacts.

``commit`` writes the files, then ``artifact.json``: its presence means done. ``find`` says whether a stage's result is
already there.
"""

import hashlib
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from headrace_api.artifact import ARTIFACT_FILE, Artifact, ArtifactFile
from headrace_api.contract import ResolvedStage
from headrace_trainer import board
from headrace_trainer.errors import StorageError
from headrace_trainer.storage import ObjectStore

_PART_TIMEOUT_SECONDS = 600.0


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path) -> list[ArtifactFile]:
    """Size and digest of every file below ``folder``, by path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return [
        ArtifactFile(path=p.relative_to(folder).as_posix(), bytes=p.stat().st_size, sha256=sha256_file(p))
        for p in paths
    ]


def read_manifest(store: ObjectStore, key: str) -> Artifact | None:
    """The manifest under ``key``, or None where there is none that can be read."""
    if not store.exists(key):
        return None
    try:
        return Artifact.model_validate_json(store.get_bytes(key))
    except ValidationError:
        return None


def find(store: ObjectStore, resolved: ResolvedStage) -> Artifact | None:
    """The finished result of exactly this stage: same hash, and every file there with its stated size."""
    artifact = read_manifest(store, f"{resolved.stage.name}/{ARTIFACT_FILE}")
    if artifact is None or artifact.hash != resolved.hash:
        return None
    sizes = {info.key: info.bytes for info in store.list(f"{resolved.stage.name}/")}
    whole = all(sizes.get(f"{resolved.stage.name}/{f.path}") == f.bytes for f in artifact.files)
    return artifact if whole else None


def verify(path: Path, file: ArtifactFile, *, address: str) -> None:
    """Compare a file with its digest.

    Raises:
        StorageError: it is missing or corrupt.
    """
    if not path.is_file():
        raise StorageError(
            f"{address}: missing: remove {ARTIFACT_FILE} beside it and run the stage that makes it again"
        )
    found = sha256_file(path)
    if found != file.sha256:
        raise StorageError(
            f"{address}: corrupt: sha256 is {found[:12]}, the manifest says {file.sha256[:12]}: "
            f"remove {ARTIFACT_FILE} beside it and run the stage that makes it again"
        )


def upload_part(store: ObjectStore, resolved: ResolvedStage, folder: Path, *, index: int) -> list[ArtifactFile]:
    """Store one pod's files and a note of them; the pod with index 0 waits for every note."""
    stage, files = resolved.stage.name, describe_files(folder)
    if index == 0 and store.exists(f"{stage}/{ARTIFACT_FILE}"):
        store.delete(f"{stage}/{ARTIFACT_FILE}")  # from here on the old files are being replaced
    for file in files:
        store.put_file(f"{stage}/{file.path}", folder / file.path)
        board.beat()
    note = "\n".join(f.model_dump_json() for f in files)
    store.put_bytes(_part_key(resolved, index), note.encode())
    return files


def commit(
    store: ObjectStore,
    resolved: ResolvedStage,
    *,
    metrics: dict[str, float],
    started: float,
    timeout: float = _PART_TIMEOUT_SECONDS,
) -> Artifact:
    """Merge the notes of every pod and write the manifest. Only the pod with index 0 calls this.

    Args:
        store: the run's store.
        resolved: the stage that has finished.
        metrics: the figures that the stage ends with.
        started: when the attempt began, ``time.time()``.
        timeout: seconds to wait for the other pods' notes.
    """
    parts = [
        _wait_for_part(store, _part_key(resolved, i), timeout=timeout) for i in range(resolved.stage.compute.nodes)
    ]
    artifact = Artifact(
        kind=resolved.stage.config.GIVES,
        run=resolved.run,
        stage=resolved.stage.name,
        hash=resolved.hash,
        inputs={slot: ref.digest for slot, ref in resolved.inputs.items()},
        files=sorted({f.path: f for part in parts for f in part}.values(), key=lambda f: f.path),
        metrics=metrics,
        created_at=datetime.now(UTC),
        duration_seconds=time.time() - started,
    )
    store.put_bytes(
        f"{resolved.stage.name}/{ARTIFACT_FILE}", artifact.model_dump_json(by_alias=True, indent=1).encode()
    )
    _remove_leftovers(store, resolved.stage.name, artifact.files)
    return artifact


def _part_key(resolved: ResolvedStage, index: int) -> str:
    return f"{resolved.stage.name}/.parts/{resolved.run_uid or resolved.run}-{resolved.attempt}/{index}.jsonl"


def _wait_for_part(store: ObjectStore, key: str, *, timeout: float) -> list[ArtifactFile]:
    deadline = time.monotonic() + timeout
    while not store.exists(key):
        if time.monotonic() > deadline:
            raise StorageError(f"{store.uri}/{key}: not there after {timeout:.0f} s: did that pod fail?")
        board.beat()
        time.sleep(0.5)
    return [ArtifactFile.model_validate_json(line) for line in store.get_bytes(key).decode().splitlines()]


def _remove_leftovers(store: ObjectStore, stage: str, files: Sequence[ArtifactFile]) -> None:
    """Remove what earlier attempts left, except checkpoints and the evidence of hangs, which have lives of their own."""
    listed = {f"{stage}/{f.path}" for f in files} | {f"{stage}/{ARTIFACT_FILE}"}
    for info in store.list(f"{stage}/"):
        kept = info.key.removeprefix(f"{stage}/").startswith(("checkpoints/", "evidence/"))
        if info.key not in listed and not kept:
            store.delete(info.key)
