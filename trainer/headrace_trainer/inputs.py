"""A stage's inputs on this node: fetched and verified once for all ranks, and kept for later attempts.

In: a reference to an artifact. Out: a local folder whose every file has the digest that the manifest states. The cache has
an entry for each artifact, by digest: its files, unless storage is a folder of this machine, and a line for each file that
was verified. What was fetched before a kill is not fetched again; an entry that nobody uses makes room for a new one.
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
"""Left free on the cache's file system."""

Stamp = tuple[int, int]
"""Size and time of change (ns) of a file when it was verified."""


def fetch(store: ObjectStore, ref: ArtifactRef, *, cache: Path) -> Path:
    """A local folder with an artifact's files, which stays until this process ends.

    Args:
        store: rooted at the folder of the stage that made the artifact.
        ref: what is wanted.
        cache: a folder that the processes of this node share.

    Raises:
        StorageError: the artifact is gone, is another one, or a file's digest does not match.
    """
    artifact = read_manifest(store, ARTIFACT_FILE)
    if artifact is None:
        raise StorageError(f"{ref.uri}: no {ARTIFACT_FILE}: the stage that makes it must run again")
    if artifact.digest != ref.digest:
        raise StorageError(
            f"{ref.uri}: digest {artifact.digest[:12]} where {ref.digest[:12]} was expected: another run wrote here; "
            "use another storage.uri, or run the stage that makes it again"
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
    """Fetch and verify what is not here yet; this process holds the entry's lock."""
    local, known = store.local_path(""), dict(_read(entry))
    folder = local or entry / "files"
    missing = [f for f in artifact.files if known.get(f.path) is None or _stamp(folder / f.path) != known[f.path]]
    if local is None:
        _make_room(entry, sum(f.bytes for f in missing))
    (entry / _VERIFIED).touch()  # the entry that was used last is removed last
    with (entry / _VERIFIED).open("a") as verified:
        for file in missing:
            path = folder / file.path
            if local is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                store.get_file(file.path, path)
            verify(path, file, address=f"{address}/{file.path}")
            # The line break comes first: whatever a kill left of the line before stays a line of its own.
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
                continue  # empty, or its writer was killed
            yield path, (size, changed)


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _use(entry: Path) -> None:
    """Keep the entry until this process ends: the kernel gives the lock up with it."""
    lock = os.open(entry.with_suffix(".used"), os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(lock, fcntl.LOCK_SH)
    entry.mkdir(exist_ok=True)  # it may have been removed while this process waited


def _make_room(entry: Path, num_bytes: int) -> None:
    """Remove entries that nobody uses, the one that was used longest ago first, until there is room."""
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
