"""Hung ranks are found, diagnosed and killed; slow ones are not.

``onStall`` is short here: a step may take that long, anything else five times as long.
"""

import json
import os
import signal
import socket
import time

import pytest

from headrace_api.faults import ExitCode, FaultClass
from trainer.agent.pods import stop

STEPS = ["steps", 10_000]
SHORT = {"onStall": "2s"}


def stalled(attempt, index=0):
    """The outcome of a pod that must end with a stall, with nothing left of it."""
    outcome = attempt.end(index)
    assert (outcome.fault, outcome.reason) == (FaultClass.STALL, "RankStalled"), outcome
    assert attempt.agents[index].returncode == ExitCode.PROCESS
    return outcome


@pytest.mark.parametrize("held", [[1], [0, 1]], ids=["one of two", "both"])
def test_ranks_that_are_held_by_a_signal(pods, held):
    attempt = pods({"*": [STEPS]}, **SHORT)
    attempt.wait_for(lambda: attempt.done() > 20)
    for rank in held:
        stop(attempt.rank(rank))
    outcome = stalled(attempt)
    assert outcome.rank == held[0]
    assert outcome.step > 0
    assert (
        f"rank {held[0]} hangs (stopped by a signal or debugger): phase Running, {outcome.step} steps done, silent for 2 s"
        in (outcome.message)
    )
    assert attempt.everything() == []
    evidence = attempt.evidence()
    assert outcome.message.endswith(f"evidence: {attempt.storage}/pretrain/evidence/attempt-1/pod-0")
    assert "steps (acts.py" in evidence["stacks.txt"].partition(f"rank {held[0]}\n")[2]
    beats = {b["rank"]: b for b in json.loads(evidence["heartbeats.json"])}
    assert beats[held[0]]["progress"]["done"] == outcome.step
    assert beats[held[0]]["seconds"] > beats[held[0]]["bound"] == 2
    assert "T (stopped)" in evidence["processes.txt"]
    kept = {path.name: path.read_text() for path in (attempt.scratch() / "evidence").iterdir()}
    assert kept == evidence
    assert [path.name for path in attempt.scratch().iterdir()] == ["evidence"]


def test_a_rank_in_a_deadlock_is_told_from_those_that_wait_for_it(pods):
    attempt = pods({"0": [["steps", 30], ["wait_for_others"]], "1": [["steps", 30], ["deadlock"]]}, **SHORT)
    outcome = stalled(attempt)
    assert outcome.rank == 1
    assert "rank 1 hangs: phase Running, 30 steps done" in outcome.message
    assert "deadlock (acts.py" in attempt.evidence()["stacks.txt"]


def test_the_rank_that_is_behind_is_the_one_that_hangs(pods):
    attempt = pods({"0": [["steps", 31], ["wait_for_others"]], "1": [["steps", 30], ["wait_for_others"]]}, **SHORT)
    assert stalled(attempt).rank == 1


@pytest.mark.parametrize("phase", ["Starting", "Loading", "Saving", "Evaluating"])
def test_a_rank_that_hangs_outside_of_its_steps(pods, phase):
    attempt = pods({"*": [["phase", phase, 0], ["deadlock"]]}, onStall="1s")
    outcome = stalled(attempt)
    assert f"phase {phase}, 0 steps done, silent for 5 s, limit 5 s" in outcome.message


def test_a_launcher_that_is_held(pods):
    attempt = pods({"*": [STEPS]}, **SHORT)
    attempt.wait_for(lambda: attempt.done() > 3)
    stop(attempt.launcher())
    outcome = stalled(attempt)
    assert outcome.message.startswith("the launcher hangs (stopped by a signal or debugger)")
    assert attempt.everything() == []


def test_imports_that_take_for_ever(pods):
    attempt = pods({"import": "takes for ever"}, onStall="1s")
    outcome = stalled(attempt)
    assert outcome.message.startswith("the launcher hangs: phase Starting")
    assert "acts.py" in attempt.evidence()["stacks.txt"]


def test_the_pod_with_the_rank_that_hangs_is_the_one_that_says_so(pods):
    waiting = [["steps", 30], ["wait_for_others"]]
    attempt = pods({"0": waiting, "1": waiting, "2": waiting, "3": [["steps", 30], ["deadlock"]]}, nodes=2, **SHORT)
    assert stalled(attempt, 1).rank == 3
    assert attempt.agents[0].poll() is None, "the other pod leaves it the time to be heard first"
    outcome = stalled(attempt, 0)
    assert outcome.message.startswith("ranks 0, 1 hang, waiting for one another or for another pod")


def test_longer_steps_and_a_long_save_are_no_stalls(pods):
    """Once steps are known, nothing but the step's own bound, or five times what a phase took before, counts."""
    slow = [["steps", 10, 0.3], ["phase", "Saving", 3.0], *([["steps", 1], ["phase", "Saving", 3.0]] * 4), ["steps", 1]]
    attempt = pods({"*": slow}, onStall="1s")
    assert attempt.end().fault is None


def test_a_pause_of_the_whole_machine_is_no_stall(pods):
    attempt = pods({"*": [["steps", 100]]}, onStall="2s")
    attempt.wait_for(lambda: attempt.done() > 10)
    # The agent first, or it would see the others stopped.
    order = [attempt.agent.pid, *(p.pid for p in attempt.everything() if p.pid != attempt.agent.pid)]
    for pid in order:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(6)
    for pid in reversed(order):
        os.kill(pid, signal.SIGCONT)
    assert attempt.end().fault is None


def test_a_task_may_work_in_silence_but_not_be_idle(pods):
    attempt = pods({"*": [["work_in_silence", 8], ["deadlock"]]}, kind="corpus", onStall="500ms")
    outcome = stalled(attempt)
    assert outcome.rank == 0
    assert "deadlock (acts.py" in attempt.evidence()["stacks.txt"]


def test_evidence_for_storage_that_does_not_answer_delays_nothing_for_long(pods):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # The look for a finished artifact is answered: there is none. Nothing is, from then on.
        attempt = pods(
            {"*": [STEPS]},
            **SHORT,
            storage={"uri": "s3://bucket/run", "endpoint": f"http://127.0.0.1:{silent.getsockname()[1]}"},
            env={"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"},
        )
        connection, _ = silent.accept()
        _answer_with_an_empty_listing(connection)
        attempt.wait_for(lambda: attempt.done() > 20)
        stop(attempt.rank(0))
        outcome = stalled(attempt)
    assert outcome.message.endswith(f"evidence: {attempt.scratch()}/evidence")
    assert {p.name for p in (attempt.scratch() / "evidence").iterdir()} >= {"stacks.txt", "heartbeats.json"}


def _answer_with_an_empty_listing(connection):
    connection.recv(65536)
    body = b'<?xml version="1.0"?><ListBucketResult><Name>bucket</Name><KeyCount>0</KeyCount></ListBucketResult>'
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    connection.close()
