"""A stage's inputs: fetched and verified once per node, for all ranks, and kept for later attempts.

In: a reference to an artifact. Out: a local folder whose every file has the digest stated in the manifest. The cache
has an entry per artifact digest: the files (unless storage is a local folder), and a line for every verified file.
Files fetched before a kill are not fetched again; unused entries are evicted to make room.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from headrace_api.artifact import ARTIFACT_FILE, Artifact, ArtifactRef
from headrace_trainer import board
from headrace_trainer.artifacts import read_manifest, verify
from headrace_trainer.errors import StorageError
from headrace_trainer.locks import locked
from headrace_trainer.storage import ObjectStore

_VERIFIED = "verified.jsonl"
_SPARE_BYTES = 1 << 30
"""Kept free on the cache's file system."""

Stamp = tuple[int, int]
"""A file's size and mtime (ns) when it was verified."""


def fetch(store: ObjectStore, ref: ArtifactRef, *, cache: Path) -> Path:
    """A local folder with an artifact's files; it stays until this process ends.

    Args:
        store: rooted at the folder of the stage that produced the artifact.
        ref: the artifact.
        cache: a folder shared by the processes of this node.

    Raises:
        StorageError: the artifact is missing or has been replaced, or a file's digest does not match.
    """
    artifact = read_manifest(store, ARTIFACT_FILE)
    if artifact is None:
        raise StorageError(f"{ref.uri}: no {ARTIFACT_FILE}: rerun the stage that makes it")
    if artifact.digest != ref.digest:
        raise StorageError(
            f"{ref.uri}: digest {artifact.digest[:12]}, expected {ref.digest[:12]}: another run wrote here; "
            "use another storage.uri, or rerun the stage that makes it"
        )
    entry = cache / ref.digest
    try:
        entry.mkdir(parents=True, exist_ok=True)
        _use(entry)
        with locked(entry.with_suffix(".lock")):
            return _bring(artifact, store, entry, address=ref.uri)
    except OSError as error:
        raise StorageError(f"{entry}: {error.strerror}: give the cache more space, or make it writable") from error


def _bring(artifact: Artifact, store: ObjectStore, entry: Path, *, address: str) -> Path:
    """Fetch and verify what is missing. The caller holds the entry's lock."""
    local, known = store.local_path(""), dict(_read(entry))
    folder = local or entry / "files"
    missing = [f for f in artifact.files if known.get(f.path) is None or _stamp(folder / f.path) != known[f.path]]
    if local is None:
        _make_room(entry, sum(f.bytes for f in missing))
    (entry / _VERIFIED).touch()  # marks the entry as used, for eviction
    with (entry / _VERIFIED).open("a") as verified:
        for file in missing:
            path = folder / file.path
            if local is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                store.get_file(file.path, path)
            verify(path, file, address=f"{address}/{file.path}")
            # Newline first, so that a line cut off by a kill does not corrupt this one.
            verified.write("\n" + json.dumps([file.path, _stamp(path)]))
            verified.flush()
            board.beat()
    return folder


def _read(entry: Path) -> Iterator[tuple[str, Stamp]]:
    if (entry / _VERIFIED).exists():
        for line in (entry / _VERIFIED).read_text().splitlines():
            try:
                path, (size, changed) = json.loads(line)
            except ValueError:
                continue  # empty, or cut off by a kill
            yield path, (size, changed)


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _use(entry: Path) -> None:
    """Pin the entry until this process ends: the kernel releases the lock then."""
    lock = os.open(entry.with_suffix(".used"), os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(lock, fcntl.LOCK_SH)
    entry.mkdir(exist_ok=True)  # it may have been evicted while we waited for the lock


def _make_room(entry: Path, num_bytes: int) -> None:
    """Evict unused entries, least recently used first, until there is room."""
    others = [e for e in entry.parent.iterdir() if e.is_dir() and e != entry]
    for other in sorted(others, key=lambda e: (_stamp(e / _VERIFIED) or (0, 0))[1]):
        if shutil.disk_usage(entry).free >= num_bytes + _SPARE_BYTES:
            return
        with other.with_suffix(".used").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(other)
