"""Inputs on a node: fetched once despite kills, and never trusted after a change."""

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from headrace_api.artifact import ArtifactRef
from headrace_api.contract import join_uri
from headrace_api.run import Storage
from headrace_trainer import artifacts, inputs
from headrace_trainer.errors import StorageError
from headrace_trainer.storage import open_store, open_uri
from trainer.common.test_storage import _resolved as make_resolved
from trainer.common.test_storage import s3_endpoint  # noqa: F401 a fixture

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def storage(s3_endpoint, tmp_path):  # noqa: F811
    return Storage(uri=f"s3://bucket/{tmp_path.name}", endpoint=s3_endpoint)


def committed(storage: Storage, folder: Path, **files: str) -> ArtifactRef:
    """An artifact of these files."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    store, resolved = open_store(storage), make_resolved(storage)
    artifacts.upload_part(store, resolved, folder, index=0)
    artifact = artifacts.commit(store, resolved, metrics={"n": 1.0}, started=0.0, timeout=1)
    return ArtifactRef(uri=join_uri(storage.uri, "work"), digest=artifact.digest, kind=artifact.kind)


FETCH = """
import os, signal, sys
from pathlib import Path
from headrace_api.artifact import ArtifactRef
from headrace_api.run import Storage
from headrace_trainer import inputs
from headrace_trainer.storage import ObjectStore, open_uri

storage, ref = Storage.model_validate_json(sys.argv[1]), ArtifactRef.model_validate_json(sys.argv[2])
store = open_uri(ref.uri, storage)
get_file = store.get_file
def get(key, path):
    print(key, flush=True)
    if key == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)
    get_file(key, path)
store.get_file = get
inputs.fetch(store, ref, cache=Path(sys.argv[3]))
"""


def fetch_elsewhere(storage: Storage, ref: ArtifactRef, cache: Path, *, die_at: str = "") -> tuple[int, list[str]]:
    """Fetch in a process of its own: its exit code, and the files that it asked storage for."""
    arguments = [storage.model_dump_json(by_alias=True), ref.model_dump_json(by_alias=True), str(cache), die_at]
    done = subprocess.run([sys.executable, "-c", FETCH, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout.split()


def test_the_next_attempt_on_a_node_fetches_nothing(storage, tmp_path):
    ref = committed(storage, tmp_path / "out", a="one", b="two")
    assert fetch_elsewhere(storage, ref, tmp_path / "cache") == (0, ["a", "b"])
    assert fetch_elsewhere(storage, ref, tmp_path / "cache") == (0, [])


def test_what_was_fetched_before_a_kill_is_not_fetched_again(storage, tmp_path):
    ref = committed(storage, tmp_path / "out", a="one", b="two", c="three")
    assert fetch_elsewhere(storage, ref, tmp_path / "cache", die_at="b") == (-signal.SIGKILL, ["a", "b"])
    assert fetch_elsewhere(storage, ref, tmp_path / "cache") == (0, ["b", "c"])


def test_a_line_that_a_kill_cut_short_counts_for_nothing(storage, tmp_path):
    ref = committed(storage, tmp_path / "out", a="one", b="two")
    assert fetch_elsewhere(storage, ref, tmp_path / "cache") == (0, ["a", "b"])
    record = tmp_path / "cache" / ref.digest / "verified.jsonl"
    record.write_text(record.read_text()[:-6])
    assert fetch_elsewhere(storage, ref, tmp_path / "cache") == (0, ["b"])
    assert fetch_elsewhere(storage, ref, tmp_path / "cache") == (0, [])


def test_a_file_that_was_changed_or_lost_on_the_node_is_fetched_again(storage, tmp_path):
    ref = committed(storage, tmp_path / "out", a="one", b="two", c="three")
    folder = inputs.fetch(open_uri(ref.uri, storage), ref, cache=tmp_path / "cache")
    (folder / "a").write_text("0ne")
    (folder / "b").unlink()
    assert fetch_elsewhere(storage, ref, tmp_path / "cache") == (0, ["a", "b"])
    assert [(folder / name).read_text() for name in "abc"] == ["one", "two", "three"]


def test_a_folder_of_this_machine_is_verified_once_and_again_where_it_changed(tmp_path):
    storage = Storage(uri=str(tmp_path / "store"))
    ref = committed(storage, tmp_path / "out", a="one", b="two")
    folder = inputs.fetch(open_uri(ref.uri, storage), ref, cache=tmp_path / "cache")
    assert folder == tmp_path / "store/work"
    assert not (tmp_path / "cache" / ref.digest / "files").exists()
    before = (folder / "b").stat()
    (folder / "b").write_text("2wo")
    os.utime(folder / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
    inputs.fetch(open_uri(ref.uri, storage), ref, cache=tmp_path / "cache")  # was not read again
    (folder / "a").write_text("0ne")
    with pytest.raises(StorageError, match="work/a: corrupt"):
        inputs.fetch(open_uri(ref.uri, storage), ref, cache=tmp_path / "cache")


def test_a_full_cache_loses_what_nobody_uses_the_oldest_first(storage, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    refs = [
        committed(storage.model_copy(update={"uri": f"{storage.uri}/{i}"}), tmp_path / f"{i}", a=f"{i}")
        for i in range(4)
    ]
    for ref in (refs[1], refs[0]):
        fetch_elsewhere(storage, ref, cache)
    inputs.fetch(open_uri(refs[2].uri, storage), refs[2], cache=cache)  # this process uses it until its end

    def usage(path):
        return Usage(0, 0, (1 << 30) + (1 if not (cache / refs[1].digest).exists() else 0))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    inputs.fetch(open_uri(refs[3].uri, storage), refs[3], cache=cache)
    assert [(cache / ref.digest).exists() for ref in refs] == [True, False, True, True]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    (cache / refs[3].digest / "files/a").unlink()
    inputs.fetch(open_uri(refs[3].uri, storage), refs[3], cache=cache)
    assert [(cache / ref.digest).exists() for ref in refs] == [False, False, True, True]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    storage = Storage(uri=str(tmp_path / "store"))
    ref = committed(storage, tmp_path / "out", a="one")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        StorageError, match=r"cache/.*: Not a directory: give the cache more space, or make it writable"
    ):
        inputs.fetch(open_uri(ref.uri, storage), ref, cache=tmp_path / "cache")
