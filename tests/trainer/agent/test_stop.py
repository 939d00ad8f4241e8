"""Ranks that are asked to stop: those that answer get their time, the others are killed.

The grace period is far longer than these tests wait, unless a test says otherwise.
"""

import signal
import time

import pytest

from headrace_api.faults import ExitCode, FaultClass
from trainer.agent.pods import stop

STEPS = ["steps", 10_000]
LONG_GRACE = {"HEADRACE_GRACE_SECONDS": "1000"}


def asked(attempt):
    """Ask a pod to stop; its outcome."""
    attempt.agent.send_signal(signal.SIGTERM)
    return attempt.end()


def test_ranks_that_answer_end_with_their_work_saved(pods):
    attempt = pods({"*": [STEPS]}, env=LONG_GRACE)
    attempt.wait_for(lambda: attempt.done() > 3)
    outcome = asked(attempt)
    assert (outcome.fault, outcome.reason, outcome.message) == (FaultClass.STOPPED, "Stopped", "saved")
    assert attempt.agent.returncode == ExitCode.STOPPED
    assert attempt.progress().phase == "Stopped"


@pytest.mark.parametrize("held", [[1], [0, 1]], ids=["one of two", "both"])
def test_held_ranks_are_not_waited_for(pods, held):
    waits = [] if 0 in held else [["wait_for_others"]]
    attempt = pods({"0": [["steps", 30], *waits, STEPS], "1": [STEPS]}, env=LONG_GRACE)
    attempt.wait_for(lambda: attempt.done() >= 30)
    for rank in held:
        stop(attempt.rank(rank))
    outcome = asked(attempt)
    assert (outcome.fault, outcome.reason) == (FaultClass.PROCESS, "KilledWhileStopping")
    assert outcome.message.startswith("ranks 0, 1 did not answer the stop request")
    assert "memory" not in outcome.message
    assert attempt.agent.returncode == ExitCode.PROCESS
    assert attempt.everything() == []


def test_ranks_in_a_deadlock_are_not_waited_for(pods):
    attempt = pods({"*": [["steps", 30], ["deadlock"]]}, env=LONG_GRACE)
    attempt.wait_for(lambda: attempt.done() == 30)
    outcome = asked(attempt)
    assert (outcome.fault, outcome.reason) == (FaultClass.PROCESS, "KilledWhileStopping")
    assert attempt.agent.returncode == ExitCode.PROCESS
    assert attempt.everything() == []


def test_a_rank_that_saves_has_the_grace_period_and_asking_twice_does_not_shorten_it(pods):
    attempt = pods({"*": [["steps", 10_000, 0.02, 13.0]]}, env=LONG_GRACE)
    attempt.wait_for(lambda: attempt.done() > 3)
    attempt.agent.send_signal(signal.SIGTERM)
    attempt.wait_for(lambda: attempt.progress().phase == "Saving")
    assert asked(attempt).message == "saved"


def test_a_rank_that_saves_for_longer_than_the_grace_period_is_killed(pods):
    attempt = pods({"*": [["steps", 10_000, 0.02, 3600.0]]}, env={"HEADRACE_GRACE_SECONDS": "2"})
    attempt.wait_for(lambda: attempt.done() > 3)
    outcome = asked(attempt)
    assert (outcome.fault, outcome.reason) == (FaultClass.PROCESS, "KilledWhileStopping")
    assert attempt.everything() == []


@pytest.mark.parametrize(
    "script", [{"import": "takes for ever"}, {"*": [["phase", "Loading", 3600]]}], ids=["importing", "loading"]
)
def test_before_the_first_step_there_is_nothing_to_wait_for(pods, script):
    attempt = pods(script, env=LONG_GRACE)
    if "import" in script:
        attempt.wait_for(attempt.launcher)
        attempt.wait_for(lambda: attempt.launcher().name() == "launcher")
        time.sleep(1)
    else:
        attempt.wait_for(lambda: attempt.progress() is not None and attempt.progress().phase == "Loading")
    outcome = asked(attempt)
    assert (outcome.fault, outcome.message) == (FaultClass.STOPPED, "stopped before the first step")
    assert attempt.agent.returncode == ExitCode.STOPPED
    assert attempt.everything() == []


def test_a_task_that_does_not_answer_was_stopped_with_nothing_lost(pods):
    attempt = pods({"*": [["phase", "Running", 3600]]}, kind="corpus", env=LONG_GRACE)
    attempt.wait_for(lambda: attempt.progress() is not None and attempt.progress().phase == "Running")
    outcome = asked(attempt)
    assert (outcome.fault, outcome.reason) == (FaultClass.STOPPED, "Stopped")
    assert outcome.message.endswith("s after the stop request; there was nothing to save")
    assert attempt.everything() == []
