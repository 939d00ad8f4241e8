"""One interface over a directory and S3: the same cases on both."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from builders import STAGES
from headrace_api.artifact import Artifact, ArtifactRef
from headrace_api.contract import ResolvedStage, join_uri
from headrace_api.run import Stage, Storage
from headrace_trainer import artifacts, inputs
from headrace_trainer.errors import StorageError, UserError
from headrace_trainer.storage import ObjectInfo, open_store, open_uri


@pytest.fixture(scope="module")
def s3_endpoint():
    """A server that speaks S3, with a bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="bucket")
    yield endpoint
    server.stop()


@pytest.fixture(params=["directory", "s3"])
def storage(request, tmp_path):
    if request.param == "directory":
        return Storage(uri=str(tmp_path / "store"))
    return Storage(uri=f"s3://bucket/{tmp_path.name}/deep", endpoint=request.getfixturevalue("s3_endpoint"))


def test_what_is_put_is_got(storage, tmp_path):
    store = open_store(storage)
    (tmp_path / "in").write_bytes(b"weights")
    store.put_file("a/b/file.bin", tmp_path / "in")
    store.put_bytes("a/note", b"text")
    store.get_file("a/b/file.bin", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"weights"
    assert store.get_bytes("a/note") == b"text"
    assert store.exists("a/note")
    assert not store.exists("a")
    assert not store.exists("a/not")


def test_listings_are_by_prefix_and_in_order(storage):
    store = open_store(storage)
    for key in ("run/b", "run/a", "run/a/x" if storage.uri.startswith("s3") else "run/c/x", "runner/a"):
        store.put_bytes(key, b"123")
    assert [i.key for i in store.list("run/")] == sorted(i.key for i in store.list("run/"))
    assert ObjectInfo(key="run/b", bytes=3) in store.list("run/")
    assert [i.key for i in store.list("runn")] == ["runner/a"]
    assert store.list("nothing/") == []


def test_deleting_is_by_prefix(storage):
    store = open_store(storage)
    for key in ("run/a", "run/b/c", "runner"):
        store.put_bytes(key, b"")
    store.delete("run/")
    assert [i.key for i in store.list("run")] == ["runner"]


def test_replacing_is_whole(storage):
    store = open_store(storage)
    store.put_bytes("x", b"long content")
    store.put_bytes("x", b"new")
    assert store.get_bytes("x") == b"new"
    assert [i.key for i in store.list("")] == ["x"]


_KILLED_IN_A_WRITE = """
import resource, signal, sys
from pathlib import Path
from headrace_trainer.storage import DirectoryStore

# The kernel kills the process in the write that goes beyond the limit.
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
store, new = DirectoryStore(Path(sys.argv[1])), Path(sys.argv[2])
store.put_file("run/x", new) if sys.argv[3] == "put_file" else store.put_bytes("run/x", new.read_bytes())
"""


@pytest.mark.parametrize("method", ["put_file", "put_bytes"])
def test_a_process_that_is_killed_in_a_write_leaves_the_old_content(tmp_path, method):
    store = open_store(Storage(uri=str(tmp_path / "store")))
    store.put_bytes("run/x", b"old content")
    (tmp_path / "new").write_bytes(b"n" * 3_000_000)
    arguments = [_KILLED_IN_A_WRITE, str(tmp_path / "store"), str(tmp_path / "new"), method]
    killed = subprocess.run([sys.executable, "-c", *arguments])
    assert killed.returncode == -signal.SIGXFSZ
    assert store.get_bytes("run/x") == b"old content"
    assert [i.key for i in store.list("")] == ["run/x"]
    store.put_bytes("run/x", b"new")
    assert store.get_bytes("run/x") == b"new"
    store.delete("run/")
    assert list((tmp_path / "store").rglob("*")) == [], "what the killed process left takes space for ever"


def test_what_is_not_there_is_said_with_its_address(storage, tmp_path):
    store = open_store(storage)
    with pytest.raises(StorageError, match="missing/thing"):
        store.get_bytes("missing/thing")
    with pytest.raises(StorageError, match="missing/thing"):
        store.get_file("missing/thing", tmp_path / "out")


def test_a_store_that_does_not_answer_says_what_to_check(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    store = open_store(Storage(uri="s3://bucket/x", endpoint="http://127.0.0.1:9"))
    with pytest.raises(StorageError, match=r"check storage\.uri, storage\.endpoint and the credentials"):
        store.list("")


@pytest.mark.parametrize("uri", [None, "gs://bucket/x"])
def test_addresses_of_no_known_kind(uri):
    with pytest.raises(UserError, match="write s3://bucket/prefix or a directory"):
        open_store(Storage.model_construct(uri=uri))


# Artifacts


def _resolved(storage: Storage, *, nodes: int = 1, attempt: int = 1, hash: str = "h1") -> ResolvedStage:
    # A gang: the one kind of stage that has several pods.
    pretrain = STAGES["base"]["pretrain"] | {"parallelism": {}}
    stage = Stage.model_validate({"name": "work", "compute": {"nodes": nodes}, "pretrain": pretrain})
    return ResolvedStage(
        run="demo",
        stage=stage,
        attempt=attempt,
        seed=1,
        hash=hash,
        storage=storage,
        output_uri=join_uri(storage.uri, "work"),
    )


def _folder(path: Path, **files: str) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def _commit(storage: Storage, folder: Path, **kwargs) -> Artifact:
    store, resolved = open_store(storage), _resolved(storage, **kwargs)
    artifacts.upload_part(store, resolved, folder, index=0)
    return artifacts.commit(store, resolved, metrics={"n": 1.0}, started=0.0, timeout=1)


def _ref(storage: Storage, artifact: Artifact) -> ArtifactRef:
    return ArtifactRef(uri=join_uri(storage.uri, "work"), digest=artifact.digest, kind=artifact.kind)


def test_a_committed_artifact_is_found_and_fetched_and_nothing_else_is_left(storage, tmp_path):
    artifact = _commit(storage, _folder(tmp_path / "out", a="one", b="two"))
    store = open_store(storage)
    assert artifacts.find(store, _resolved(storage)) == artifact
    ref = _ref(storage, artifact)
    local = inputs.fetch(open_uri(ref.uri, storage), ref, cache=tmp_path / "cache")
    assert {p.name: p.read_text() for p in local.iterdir() if p.name in "ab"} == {"a": "one", "b": "two"}
    assert [i.key for i in store.list("")] == ["work/a", "work/artifact.json", "work/b"]


def test_another_hash_is_another_result(storage, tmp_path):
    _commit(storage, _folder(tmp_path / "out", a="one"))
    assert artifacts.find(open_store(storage), _resolved(storage, hash="h2")) is None


def test_a_missing_file_makes_a_result_unfinished(storage, tmp_path):
    _commit(storage, _folder(tmp_path / "out", a="one", b="two"))
    open_store(storage).delete("work/b")
    assert artifacts.find(open_store(storage), _resolved(storage)) is None


def test_an_artifact_without_its_manifest_is_not_there(storage, tmp_path):
    store, resolved = open_store(storage), _resolved(storage)
    artifacts.upload_part(store, resolved, _folder(tmp_path / "out", a="one"), index=0)
    assert artifacts.find(store, resolved) is None


def test_a_corrupt_file_is_named_with_both_digests(storage, tmp_path):
    artifact = _commit(storage, _folder(tmp_path / "out", a="one"))
    open_store(storage).put_bytes("work/a", b"0ne")
    ref = _ref(storage, artifact)
    with pytest.raises(StorageError, match=r"work/a: corrupt: sha256 is [0-9a-f]{12}, the manifest says [0-9a-f]{12}"):
        inputs.fetch(open_uri(ref.uri, storage), ref, cache=tmp_path / "cache")


def test_an_artifact_that_was_replaced_is_refused(storage, tmp_path):
    first = _commit(storage, _folder(tmp_path / "one", a="one"))
    _commit(storage, _folder(tmp_path / "two", a="two"), hash="h2")
    ref = _ref(storage, first)
    with pytest.raises(StorageError, match="another run wrote here"):
        inputs.fetch(open_uri(ref.uri, storage), ref, cache=tmp_path / "cache")


def test_a_new_result_replaces_the_old_files_but_not_the_checkpoints(storage, tmp_path):
    _commit(storage, _folder(tmp_path / "one", old="1"))
    open_store(storage).put_bytes("work/checkpoints/x", b"")
    _commit(storage, _folder(tmp_path / "two", new="2"), hash="h2")
    keys = [i.key for i in open_store(storage).list("")]
    assert keys == ["work/artifact.json", "work/checkpoints/x", "work/new"]


_KILLED_IN_AN_UPLOAD = """
import os, signal, sys
from pathlib import Path
from headrace_api.contract import ResolvedStage
from headrace_trainer import artifacts, inputs
from headrace_trainer.storage import open_store

resolved = ResolvedStage.model_validate_json(sys.argv[1])
store = open_store(resolved.storage)
put_file = store.put_file

def put_and_die(key, path):
    put_file(key, path)
    os.kill(os.getpid(), signal.SIGKILL)

store.put_file = put_and_die
artifacts.upload_part(store, resolved, Path(sys.argv[2]), index=0)
"""


def test_a_process_that_is_killed_while_it_replaces_a_result_leaves_no_result(storage, tmp_path):
    _commit(storage, _folder(tmp_path / "one", a="one", b="two"))
    new = _folder(tmp_path / "two", a="uno", b="due")
    arguments = [_resolved(storage, hash="h2").model_dump_json(by_alias=True), str(new)]
    killed = subprocess.run([sys.executable, "-c", _KILLED_IN_AN_UPLOAD, *arguments])
    assert killed.returncode == -signal.SIGKILL
    store = open_store(storage)
    assert (store.get_bytes("work/a"), store.get_bytes("work/b")) == (b"uno", b"two")
    assert artifacts.find(store, _resolved(storage)) is None, "half of its files are the new ones"
    assert artifacts.find(store, _resolved(storage, hash="h2")) is None
    again = _commit(storage, new, hash="h2", attempt=2)
    assert artifacts.find(store, _resolved(storage, hash="h2")) == again


def test_pods_leave_parts_and_the_first_waits_for_the_others(storage, tmp_path):
    resolved = _resolved(storage, nodes=2)
    artifacts.upload_part(open_store(storage), resolved, _folder(tmp_path / "zero", a="0"), index=0)
    late = threading.Timer(
        0.5,
        lambda: artifacts.upload_part(open_store(storage), resolved, _folder(tmp_path / "one", b="1"), index=1),
    )
    late.start()
    artifact = artifacts.commit(open_store(storage), resolved, metrics={}, started=0.0, timeout=30)
    late.join()
    assert [f.path for f in artifact.files] == ["a", "b"]


def test_a_pod_that_leaves_nothing_is_missed(storage, tmp_path):
    resolved = _resolved(storage, nodes=2)
    artifacts.upload_part(open_store(storage), resolved, _folder(tmp_path / "zero", a="0"), index=0)
    with pytest.raises(StorageError, match="did that pod fail"):
        artifacts.commit(open_store(storage), resolved, metrics={}, started=0.0, timeout=0.1)


def test_an_earlier_attempts_parts_are_not_taken_for_this_ones(storage, tmp_path):
    old = _resolved(storage, nodes=2)
    artifacts.upload_part(open_store(storage), old, _folder(tmp_path / "one", b="1"), index=1)
    new = _resolved(storage, nodes=2, attempt=2)
    artifacts.upload_part(open_store(storage), new, _folder(tmp_path / "zero", a="0"), index=0)
    with pytest.raises(StorageError, match="did that pod fail"):
        artifacts.commit(open_store(storage), new, metrics={}, started=0.0, timeout=0.1)
