"""Evidence of a hang when it is hard to get, and its limits."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from headrace_api.contract import ResolvedStage
from headrace_trainer.agent import evidence
from headrace_trainer.errors import StorageError
from headrace_trainer.storage import DirectoryStore

RANK = """
import sys, time
from pathlib import Path
from headrace_trainer.stage import _show_stacks_when_asked
class Context:
    scratch, local_rank = Path(sys.argv[1]), 0
_show_stacks_when_asked(Context)
print("ready", flush=True)
def asleep():
    time.sleep(3600)
asleep()
"""


@pytest.fixture
def rank(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def test_stacks_are_read_from_outside(rank, tmp_path):
    stacks = evidence.read_stacks({4: rank.pid}, tmp_path, first=4)
    assert '"MainThread"\n    asleep' in stacks[4]


def test_a_rank_is_asked_where_it_cannot_be_looked_at(rank, tmp_path, monkeypatch):
    refused = tmp_path / "bin"
    refused.mkdir()
    (refused / "py-spy").write_text("#!/bin/sh\necho permission denied >&2\nexit 1\n")
    (refused / "py-spy").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(refused / "python"))
    stacks = evidence.read_stacks({4: rank.pid}, tmp_path, first=4)
    assert "line 10 in asleep" in stacks[4]
    assert rank.poll() is None


def test_what_the_kernel_says(rank):
    process = psutil.Process(rank.pid)
    while process.status() != psutil.STATUS_SLEEPING:
        time.sleep(0.01)
    text = evidence.describe_processes({0: rank.pid})
    assert f"rank 0, process {rank.pid}" in text
    assert "State:\tS (sleeping)" in text


@pytest.mark.parametrize(
    ("stacks", "waits"),
    [
        ("", None),
        ('Thread 1 (idle): "MainThread"\n    all_reduce (torch/distributed/distributed_c10d.py:4181)\n', True),
        (
            'Thread 1 (idle): "MainThread"\n    acquire\n\nThread 2 (idle): "saver"\n    gather (distributed_c10d.py:1)\n',
            False,
        ),
        ('Current thread 0x1 (most recent call first):\n  File "distributed_c10d.py", line 1 in gather\n', True),
    ],
)
def test_who_waits_in_a_collective(stacks, waits):
    assert evidence.waits_in_collective(stacks) is waits


def resolved(folder: Path, *, attempt: int = 1) -> ResolvedStage:
    stage = {"name": "base", "corpus": {"sources": [{"uri": "/raw"}]}}
    return ResolvedStage.model_validate(
        {
            **{"run": "test", "stage": stage, "attempt": attempt, "seed": 1, "hash": "a" * 64},
            **{"storage": {"uri": str(folder)}, "outputUri": f"{folder}/base"},
        }
    )


def test_only_the_newest_attempts_are_kept(tmp_path):
    store = DirectoryStore(tmp_path)
    for attempt in range(1, 13):
        stage = resolved(tmp_path, attempt=attempt)
        where = evidence.upload({"stacks.txt": b"x"}, stage, index=3, open_store=lambda: store)
        assert where == f"{tmp_path}/base/evidence/attempt-{attempt}/pod-3"
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "base/evidence").iterdir())) > 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    kept = sorted(path.name for path in (tmp_path / "base/evidence").iterdir())
    assert kept == ["attempt-10", "attempt-11", "attempt-12", "attempt-8", "attempt-9"]


def test_storage_that_refuses_is_not_fatal(tmp_path):
    def refuse():
        raise StorageError("no such bucket")

    assert evidence.upload({"stacks.txt": b"x"}, resolved(tmp_path), index=0, open_store=refuse) is None


def test_a_text_of_evidence_has_a_bound():
    assert len(evidence.shorten("é" * (1 << 21))) == 1 << 20


def test_flight_records_are_asked_for_and_taken(tmp_path):
    (tmp_path / "evidence").mkdir()
    pipe = tmp_path / "nccl-pipe-4.pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "evidence" / "nccl-4").write_bytes(b"x" * (5 << 20))
    records = evidence.read_flight_records(tmp_path, [4])
    assert os.read(reader, 10) == b"1"
    os.close(reader)
    assert {name: len(data) for name, data in records.items()} == {"nccl-4": 4 << 20}


def test_without_nccl_there_are_no_flight_records(tmp_path):
    assert evidence.read_flight_records(tmp_path, [0, 1]) == {}
