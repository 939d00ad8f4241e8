"""Find, verify and commit artifacts.

``commit`` writes the files, then ``artifact.json``, whose presence means done. ``find`` looks for a stage's finished
result.
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
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path) -> list[ArtifactFile]:
    """Size and digest of every file below ``folder``, sorted by path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return [
        ArtifactFile(path=p.relative_to(folder).as_posix(), bytes=p.stat().st_size, sha256=sha256_file(p))
        for p in paths
    ]


def read_manifest(store: ObjectStore, key: str) -> Artifact | None:
    """The manifest under ``key``; None if it is missing or invalid."""
    if not store.exists(key):
        return None
    try:
        return Artifact.model_validate_json(store.get_bytes(key))
    except ValidationError:
        return None


def find(store: ObjectStore, resolved: ResolvedStage) -> Artifact | None:
    """The finished artifact of exactly this stage: same hash, all files present with their stated sizes."""
    artifact = read_manifest(store, f"{resolved.stage.name}/{ARTIFACT_FILE}")
    if artifact is None or artifact.hash != resolved.hash:
        return None
    sizes = {info.key: info.bytes for info in store.list(f"{resolved.stage.name}/")}
    whole = all(sizes.get(f"{resolved.stage.name}/{f.path}") == f.bytes for f in artifact.files)
    return artifact if whole else None


def verify(path: Path, file: ArtifactFile, *, address: str) -> None:
    """Check a file against its digest.

    Raises:
        StorageError: it is missing or corrupt.
    """
    if not path.is_file():
        raise StorageError(f"{address}: missing: remove {ARTIFACT_FILE} beside it and rerun the stage that makes it")
    found = sha256_file(path)
    if found != file.sha256:
        raise StorageError(
            f"{address}: corrupt: sha256 is {found[:12]}, the manifest says {file.sha256[:12]}: "
            f"remove {ARTIFACT_FILE} beside it and rerun the stage that makes it"
        )


def upload_part(store: ObjectStore, resolved: ResolvedStage, folder: Path, *, index: int) -> list[ArtifactFile]:
    """Upload one pod's files and a list of them, which pod 0 waits for."""
    stage, files = resolved.stage.name, describe_files(folder)
    if index == 0 and store.exists(f"{stage}/{ARTIFACT_FILE}"):
        store.delete(f"{stage}/{ARTIFACT_FILE}")  # from here on, its files are being replaced
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
    """Merge the file lists of all pods and write the manifest. Only pod 0 calls it.

    Args:
        store: the run's store.
        resolved: the finished stage.
        metrics: the stage's final metrics.
        started: when the attempt started, from ``time.time()``.
        timeout: seconds to wait for the other pods' file lists.
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
            raise StorageError(f"{store.uri}/{key}: missing after {timeout:.0f} s: did that pod fail?")
        board.beat()
        time.sleep(0.5)
    return [ArtifactFile.model_validate_json(line) for line in store.get_bytes(key).decode().splitlines()]


def _remove_leftovers(store: ObjectStore, stage: str, files: Sequence[ArtifactFile]) -> None:
    """Delete what earlier attempts left, except checkpoints and evidence of hangs, which are pruned elsewhere."""
    listed = {f"{stage}/{f.path}" for f in files} | {f"{stage}/{ARTIFACT_FILE}"}
    for info in store.list(f"{stage}/"):
        kept = info.key.removeprefix(f"{stage}/").startswith(("checkpoints/", "evidence/"))
        if info.key not in listed and not kept:
            store.delete(info.key)
