"""The true state of a run that no command is running, whatever its stored status says."""

from dataclasses import dataclass, replace
from datetime import timedelta

import pytest

from builders import START, ended, failed, make_run, seen, succeeded
from headrace_api.contract import Progress
from headrace_api.faults import FaultClass
from headrace_api.run import ConditionType, RunStatus, SavedCheckpoint, StageState
from headrace_cli.live import Rest, as_it_is
from headrace_operator.brain.observed import Attempt, AttemptState
from headrace_operator.brain.plan import plan

LATER = START + timedelta(hours=9)
ENDPOINT = "http://127.0.0.1:8000"


@dataclass
class Stored:
    """A run as its last command left it: the status, and the newest attempt."""

    status: RunStatus
    attempt: Attempt


def running(*stages: str) -> Stored:
    run = make_run(*stages)
    decided = plan(run, seen())
    start = decided.start[0]
    attempt = Attempt(stage=start.stage.name, number=1, hash=start.hash, state=AttemptState.RUNNING)
    run = run.model_copy(update={"status": decided.status})
    progress = Progress(stage=attempt.stage, attempt=1, phase="Running", done=30, total=100, loss=4.2, time=START)
    attempt = replace(attempt, progress=progress)
    return Stored(plan(run, seen(attempt, after_seconds=20)).status, attempt)


def at_end(**outcome_or_progress) -> Stored:
    it = running("corpus")
    run = make_run("corpus").model_copy(update={"status": it.status})
    attempt = ended(it.attempt, outcome_or_progress["outcome"])
    return Stored(plan(run, seen(attempt, after_seconds=30)).status, attempt)


def serving() -> Stored:
    stages = ("corpus", "tok", "tokens", "base", "ship", "serve")
    run, attempts = make_run(*stages), []
    for _ in stages:
        decided = plan(run, seen(*attempts))
        run = run.model_copy(update={"status": decided.status})
        start = decided.start[0]
        attempt = Attempt(stage=start.stage.name, number=1, hash=start.hash, state=AttemptState.RUNNING)
        attempts.append(ended(attempt, succeeded()))
    progress = Progress(stage="serve", attempt=1, phase="Serving", endpoint=ENDPOINT, time=START)
    attempt = replace(attempt, progress=progress)
    status = plan(run, seen(*attempts[:-1], attempt)).status
    assert (status.summary, status.endpoint) == ("Complete", ENDPOINT)
    return Stored(status, attempt)


def gone(attempt: Attempt, *, after_seconds: float = 30) -> Attempt:
    vanished = failed(FaultClass.POD, reason="AgentVanished")
    over = START + timedelta(seconds=after_seconds)
    return replace(attempt, state=AttemptState.FAILED, outcome=vanished, ended_at=over)


def now(stored: Stored, *attempts: Attempt, rest: Rest = Rest.INTERRUPTED) -> RunStatus:
    return as_it_is(stored.status, attempts, now=LATER, rest=rest)


@pytest.mark.parametrize("attempts", ["gone", "removed"])
def test_a_run_of_which_nothing_lives_is_interrupted(attempts):
    it = running("corpus", "tok")
    status = now(it, *([gone(it.attempt)] if attempts == "gone" else []))
    assert status.summary == "Interrupted"
    assert status.stages[0].state is StageState.SUSPENDED
    assert status.condition(ConditionType.SUSPENDED)
    assert (status.step, status.loss) == ("30/100", "4.2000"), "how far it came is kept"
    assert (status.tokens_per_second, status.eta, status.phase_message) == (None, None, None)


def test_its_time_ends_with_its_last_process():
    it = running("corpus")
    assert now(it, gone(it.attempt, after_seconds=45)).stages[0].active_seconds == 45


def test_agents_that_live_on_are_followed():
    it = running("corpus", "tok")
    at = Progress(
        stage="corpus",
        attempt=1,
        done=77,
        total=100,
        checkpoint=SavedCheckpoint(step=70, uri="/store/base/step-70", time=START),
        time=LATER,
    )
    status = now(it, replace(it.attempt, progress=at))
    assert (status.summary, status.step) == ("Running", "77/100")
    assert status.checkpoint is not None
    assert status.checkpoint.step == 70
    assert status.stages[0].state is StageState.RUNNING


def test_an_agent_that_finished_alone_leaves_an_interrupted_run():
    it = running("corpus", "tok")
    status = now(it, ended(it.attempt, succeeded()))
    assert status.summary == "Interrupted"


def test_a_server_that_lives_is_shown_and_one_that_died_is_not():
    it = serving()
    assert now(it, it.attempt) == it.status
    status = now(it, gone(it.attempt))
    assert (status.summary, status.endpoint) == ("Interrupted", None)
    assert [s.endpoint for s in status.stages] == [None] * 6
    assert not status.condition(ConditionType.COMPLETE)


def test_an_older_server_that_lives_is_where_the_model_answers():
    """The next one was killed before it answered."""
    it = serving()
    older = replace(it.attempt, number=1)
    stage = it.status.stages[-1].model_copy(update={"state": StageState.STARTING, "attempt": 2})
    it.status = it.status.model_copy(update={"stages": [*it.status.stages[:-1], stage], "conditions": []})
    status = now(it, older, gone(replace(it.attempt, number=2, progress=None)))
    assert (status.summary, status.endpoint) == ("Interrupted", ENDPOINT)


def test_a_server_that_was_stopped_leaves_a_suspended_run():
    it = serving()
    status = now(it, gone(it.attempt), rest=Rest.STOPPED)
    assert (status.summary, status.endpoint, status.stage) == ("Suspended", None, "serve")
    assert [s.state for s in status.stages[:-1]] == [StageState.SUCCEEDED] * 5


@pytest.mark.parametrize("outcome", [succeeded(), failed(FaultClass.USER)])
@pytest.mark.parametrize("rest", Rest)
def test_a_run_that_ended_stays_as_it_ended(outcome, rest):
    it = at_end(outcome=outcome)
    assert now(it, it.attempt, rest=rest) == it.status


def test_a_run_that_waits_for_a_retry_that_nobody_makes_is_interrupted():
    it = running("corpus")
    run = make_run("corpus")
    for number in (1, 2):
        attempt = ended(replace(it.attempt, number=number), failed(FaultClass.POD))
        it.status = plan(run.model_copy(update={"status": it.status}), seen(attempt, after_seconds=30)).status
    assert it.status.summary == "Restarting"
    status = now(it, attempt)
    assert status.summary == "Interrupted"
    assert status.stages[0].retry_at is None


def test_what_was_suspended_stays_suspended():
    it = running("corpus")
    stopped = now(it, gone(it.attempt), rest=Rest.STOPPED)
    assert stopped.summary == "Suspended"
    assert as_it_is(stopped, [gone(it.attempt)], now=LATER, rest=Rest.INTERRUPTED) == stopped
