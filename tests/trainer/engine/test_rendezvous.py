"""Ranks that do not come are named, after a bounded time."""

import os
import socket
import time

import pytest

from headrace_trainer.errors import PeersMissing
from trainer.engine.gangs import gang


def join(rank, world, gang_size, seconds):
    from headrace_trainer.engine.parallel.rendezvous import meet

    os.environ["HEADRACE_JOIN_SECONDS"] = str(seconds)
    store = meet(rank=rank, world=gang_size)
    store.set(f"said by {rank}", "hello")
    said = [store.get(f"said by {other}").decode() for other in range(gang_size)]
    store.add("heard", 1)
    while rank == 0 and store.add("heard", 0) < gang_size:
        time.sleep(0.01)  # the store ends with this process
    return said


def test_all_ranks_meet_whoever_comes_first():
    ended = gang(join, 3, 3, 60)
    assert [e.value for e in ended] == [["hello"] * 3] * 3, ended


def test_ranks_that_do_not_come_are_named_by_those_that_did():
    ended = gang(join, 2, 4, 3)
    assert [e.error for e in ended] == ["PeersMissing", "PeersMissing"], ended
    assert {e.message for e in ended} == {"ranks 2, 3 did not join within 3 s: see how their pods are"}


def test_a_rank_0_that_does_not_come_is_named_with_its_address(monkeypatch):
    from headrace_trainer.engine.parallel.rendezvous import meet

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("HEADRACE_JOIN_SECONDS", "0.5")
    with pytest.raises(PeersMissing, match=rf"rank 0 at 127\.0\.0\.1:{port} did not answer within 0 s"):
        meet(rank=1, world=2)
