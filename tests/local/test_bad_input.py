"""Bad input to `headrace run`: a clear message, exit code 1 or 2, and no partial output mistaken for a result."""

import gzip
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter


def _nothing_is_taken_for_done(headrace, stage: str) -> None:
    assert headrace.stage(stage)["state"] == "Failed"
    assert not (headrace.artifact(stage) / "artifact.json").exists()


def test_an_unknown_field_is_refused_before_anything_starts(headrace):
    path = headrace.manifest("corpus", sed=1)
    for command in ("validate", "plan", "run"):
        done = headrace(command, str(path))
        assert done.code == 2
        assert "spec.sed: unknown field; did you mean seed?" in done.err
    assert not (headrace.home / "runs").exists()


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("tensor", "spec.stages[3].pretrain.parallelism.tensor: 3: must divide the model's 4 heads; use 1, 2 or 4"),
        ("pipeline", "spec.stages[3].pretrain.parallelism.pipeline: 3: must divide the model's 2 layers; use 1 or 2"),
    ],
)
def test_a_layout_that_does_not_fit_the_model_is_refused(headrace, axis, expected):
    path = headrace.manifest(
        "corpus", "tok", "tokens", "base", edit=lambda s: s["base"]["pretrain"].update(parallelism={axis: 3})
    )
    done = headrace("run", str(path))
    assert done.code == 2
    assert expected in done.err


def test_a_manifest_that_is_not_there(headrace):
    done = headrace("run", "nothing.yaml")
    assert done.code == 2
    assert "nothing.yaml: no such file: check the path" in done.err


def test_a_source_that_is_not_there_is_found_before_anything_starts_and_is_not_missed_afterwards(headrace):
    path = str(headrace.manifest("corpus"))
    done = headrace("run", path)
    assert done.code == 2
    assert f"corpus.sources[0].uri: '{headrace.folder / 'raw'}': no such file or folder; check the path" in done.err
    assert not list(headrace.home.rglob("status.json"))
    headrace.write_text()
    assert headrace("run", path).code == 0
    shutil.rmtree(headrace.folder / "raw")
    assert headrace("run", path).code == 0, "what was read from it is done"


def test_a_folder_without_a_document(headrace):
    (headrace.folder / "raw").mkdir()
    done = headrace("run", str(headrace.manifest("corpus")))
    assert done.code == 1
    assert "raw" in done.err
    _nothing_is_taken_for_done(headrace, "corpus")


def test_a_corpus_that_filters_to_nothing_says_which_filter_dropped_how_many(headrace):
    headrace.write_text()
    path = headrace.manifest("corpus", edit=lambda s: s["corpus"]["corpus"]["quality"].update(minWords=100_000))
    done = headrace("run", str(path))
    assert done.code == 1
    assert "minWords" in done.err
    _nothing_is_taken_for_done(headrace, "corpus")


def _warc(text: str) -> bytes:
    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=True)
    for i in range(3):
        headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
        page = io.BytesIO(f"<html><body><p>{text} {i}</p></body></html>".encode())
        writer.write_record(
            writer.create_warc_record(f"http://localhost/{i}", "response", payload=page, http_headers=headers)
        )
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("pages.warc.gz", _warc("The quick brown fox. " * 50)[:-40], "pages.warc.gz"),
        ("note.txt", b"good text \xff\xfe and more", "note.txt"),
        ("rows.jsonl", b'{"text": "fine"}\n{"text": \n', "rows.jsonl"),
        ("rows.jsonl.gz", gzip.compress(b'{"words": "no text field"}\n'), "rows.jsonl.gz"),
    ],
)
def test_files_that_are_broken_are_named(headrace, name, content, expected):
    headrace.write_text()
    (headrace.folder / "raw" / name).write_bytes(content)
    done = headrace("run", str(headrace.manifest("corpus")))
    assert done.code == 1
    assert expected in done.err
    _nothing_is_taken_for_done(headrace, "corpus")


def test_a_vocabulary_that_the_data_does_not_support(headrace):
    headrace.write_text()
    path = headrace.manifest("corpus", "tok", edit=lambda s: s["tok"]["tokenizer"].update(vocabSize="500k"))
    done = headrace("run", str(path))
    assert done.code == 1
    assert "tokenizer.vocabSize: 500000: the corpus supports at most" in done.err
    _nothing_is_taken_for_done(headrace, "tok")


def test_storage_that_does_not_answer_is_found_before_anything_costly(headrace):
    headrace.write_text()
    headrace.env |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    path = headrace.manifest("corpus", storage={"uri": "s3://nowhere/x", "endpoint": "http://127.0.0.1:9"})
    done = headrace("run", str(path))
    assert done.code == 1
    assert "s3://nowhere/x" in done.err
    assert "check storage.uri, storage.endpoint and the credentials" in done.err
    log = headrace("logs", "small").out
    assert "kept" not in log, "documents were read before the storage was tried"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(headrace, small_disk):
    headrace.write_text()
    path = headrace.manifest("corpus", "tok", "tokens", storage={"uri": str(small_disk)})
    done = headrace("run", str(path))
    assert done.code == 1
    assert "no space left on the device" in done.err
    assert str(small_disk) in done.err
    failed = next(s for s in headrace.status()["stages"] if s["state"] == "Failed")
    assert not (small_disk / failed["name"] / "artifact.json").exists()
    assert not list(Path(small_disk).rglob(".staged-*"))


def test_a_shard_whose_digest_does_not_match(headrace):
    headrace.write_text()
    path = headrace.manifest("corpus", "tok", "tokens")
    assert headrace("run", str(path)).code == 0
    shard = next(headrace.artifact("tokens").glob("train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    path = headrace.manifest("corpus", "tok", "tokens", "base")
    done = headrace("run", str(path))
    assert done.code == 1
    assert f"{shard}: corrupt: sha256 is" in done.err
    _nothing_is_taken_for_done(headrace, "base")


def test_a_result_that_was_removed_is_made_again(headrace):
    headrace.write_text()
    path = headrace.manifest("corpus", "tok")
    assert headrace("run", str(path)).code == 0
    before = json.loads((headrace.artifact("tok") / "artifact.json").read_text())
    (headrace.artifact("tok") / "artifact.json").unlink()
    assert headrace("run", str(path)).code == 0
    after = json.loads((headrace.artifact("tok") / "artifact.json").read_text())
    assert [f["sha256"] for f in after["files"]] == [f["sha256"] for f in before["files"]]
    assert headrace.stage("corpus")["attempt"] == 1
    assert headrace.stage("tok")["attempt"] == 2


def test_names_that_no_run_has(headrace):
    for command in (("status", "nobody"), ("logs", "nobody"), ("stop", "nobody")):
        done = headrace(*command)
        assert done.code == 2
        assert "nobody: no such run" in done.err
