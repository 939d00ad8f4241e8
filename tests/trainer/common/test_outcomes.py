"""Which rank's outcome explains how a pod ended."""

import pytest

from headrace_api.faults import ExitCode, FaultClass, Outcome
from headrace_trainer.agent.launch import Ended
from headrace_trainer.agent.outcomes import exit_code_of, explain

CLOSED = Outcome(fault=FaultClass.PROCESS, reason="RuntimeError", message="connection closed by peer", rank=0)
BAD_DATA = Outcome(fault=FaultClass.USER, reason="UserError", message="bad document", rank=1)
SAVED = Outcome(fault=FaultClass.STOPPED, reason="Stopped", message="saved", step=7, rank=0)
DONE = Outcome(artifact_digest="ab")
STALLED = Outcome(fault=FaultClass.STALL, reason="RankStalled", message="rank 1 hangs", rank=1)
KILLED = Outcome(fault=FaultClass.PROCESS, reason="KilledWhileStopping", message="did not answer")


def ended(*codes):
    """How ranks ended, the first one first: (rank, code)."""
    return [Ended(rank=rank, code=code) for rank, code in codes]


@pytest.mark.parametrize(
    ("words", "ends", "verdict", "reason", "rank", "ends_with"),
    [
        ([Outcome(), DONE], ended((1, 0), (0, 0)), None, "Succeeded", None, ExitCode.OK),
        ([CLOSED, BAD_DATA], ended((0, 70), (1, 2)), None, "UserError", 1, ExitCode.USER),
        ([CLOSED], ended((3, -9), (0, 70)), None, "RankKilled", 3, ExitCode.PROCESS),
        ([CLOSED], ended((0, 70), (3, -9)), None, "RankKilled", 3, ExitCode.PROCESS),
        ([], ended((0, -15)), None, "RankKilled", 0, ExitCode.PROCESS),
        ([CLOSED], ended((0, 70), (1, 1)), None, "RuntimeError", 0, ExitCode.PROCESS),
        ([SAVED, CLOSED], ended((0, 75), (1, 70)), None, "Stopped", 0, ExitCode.STOPPED),
        ([], [], KILLED, "KilledWhileStopping", None, ExitCode.PROCESS),
        ([], ended((1, -9)), KILLED, "KilledWhileStopping", None, ExitCode.PROCESS),
        ([CLOSED], [], STALLED, "RankStalled", 1, ExitCode.PROCESS),
        ([SAVED], ended((0, 75)), KILLED, "Stopped", 0, ExitCode.STOPPED),
        ([], ended((1, 0), (2, 3)), None, "RanksFailed", 2, ExitCode.PROCESS),
        ([], ended((None, -9)), None, "RankKilled", None, ExitCode.PROCESS),
        ([], [], None, "RanksFailed", None, ExitCode.PROCESS),
    ],
    ids=[
        *("success", "bad data explains closed connections", "a killed rank explains them", "in whatever order"),
        *("a rank alone", "an error of its own", "a stop that was saved", "no word within the grace period"),
        *("some killed by the agent", "a hang explains closed connections", "saved before the rest was killed"),
        *("no word at all", "the launcher", "nobody"),
    ],
)
def test_who_explains_the_end(words, ends, verdict, reason, rank, ends_with):
    outcome = explain(words, ends, verdict=verdict)
    assert (outcome.reason, outcome.rank) == (reason, rank)
    assert exit_code_of(outcome) == ends_with


def test_success_names_the_artifact():
    assert explain([Outcome(), DONE], ended((0, 0), (1, 0))).artifact_digest == "ab"


@pytest.mark.parametrize(
    ("oom_kills", "reason", "message"),
    [
        (None, "RankKilled", "rank 2 was killed by SIGKILL; if nobody did that, it may have run out of memory"),
        (0, "RankKilled", "rank 2 was killed by SIGKILL"),
        (
            *(1, "OutOfMemory"),
            "rank 2 ran out of memory and was killed by the kernel: raise compute.memory, or lower microBatchSize",
        ),
    ],
    ids=["the kernel does not say", "the kernel did not", "the kernel did"],
)
def test_a_rank_ended_by_sigkill(oom_kills, reason, message):
    outcome = explain([], ended((2, -9)), oom_kills=oom_kills)
    assert (outcome.reason, outcome.message, outcome.rank) == (reason, message, 2)


def test_what_the_agent_killed_did_not_run_out_of_memory():
    assert "memory" not in explain([], ended((2, -9)), verdict=STALLED, oom_kills=None).message
