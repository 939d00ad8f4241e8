"""Active time: attempts count, the gaps between them do not."""

from dataclasses import replace
from datetime import timedelta

import pytest

from builders import START, ended, failed, make_run, seen, succeeded
from headrace_api.contract import Progress
from headrace_api.faults import FaultClass
from headrace_api.run import StageState
from headrace_operator.brain.active_time import active_seconds
from headrace_operator.brain.observed import Attempt, AttemptState
from headrace_operator.brain.plan import plan


class Story:
    """A run of one stage, planned again and again while time passes."""

    def __init__(self, *stages: str) -> None:
        self.run, self.attempt = make_run(*stages), None
        self.now = 0.0

    def at(self, seconds: float, attempt: Attempt | None = None, *, suspend: bool = False) -> None:
        self.now, self.attempt = seconds, attempt or self.attempt
        run = self.run.model_copy(update={"spec": self.run.spec.model_copy(update={"suspend": suspend})})
        decided = plan(run, seen(*([self.attempt] if self.attempt else []), after_seconds=seconds))
        self.run = self.run.model_copy(update={"status": decided.status})
        for start in decided.start:
            known = self.attempt is not None and (self.attempt.stage, self.attempt.number)
            if known != (start.stage.name, start.attempt):
                state = AttemptState.RUNNING
                self.attempt = Attempt(stage=start.stage.name, number=start.attempt, hash=start.hash, state=state)

    @property
    def stage(self):
        return self.run.status.stages[-1]

    @property
    def active(self) -> float:
        return active_seconds(self.stage, now=START + timedelta(seconds=self.now))


def test_a_stage_that_runs_through_was_active_from_start_to_end():
    story = Story("corpus")
    story.at(0)
    story.at(40)
    assert story.active == 40
    story.at(100, ended(story.attempt, succeeded()))
    story.at(5_000)
    assert (story.stage.state, story.active) == (StageState.SUCCEEDED, 100)


def test_suspended_hours_do_not_count():
    story = Story("corpus")
    story.at(0)
    story.at(60, replace(story.attempt, state=AttemptState.STOPPING), suspend=True)
    story.at(70, ended(story.attempt, failed(FaultClass.STOPPED)), suspend=True)
    assert story.stage.state is StageState.SUSPENDED
    story.at(36_000, suspend=True)
    assert story.active == 70
    story.at(72_000)
    story.at(72_030, ended(story.attempt, succeeded()))
    assert (story.stage.state, story.active) == (StageState.SUCCEEDED, 100)


def test_the_wait_for_a_retry_does_not_count():
    story = Story("corpus")
    story.at(0)
    story.at(10, ended(story.attempt, failed(FaultClass.POD)))
    story.at(30, ended(story.attempt, failed(FaultClass.POD)))
    assert story.stage.state is StageState.PENDING
    story.at(31)
    assert story.active == 30
    story.at(40)
    story.at(50)
    assert (story.stage.state, story.active) == (StageState.STARTING, 40)


@pytest.mark.parametrize("outcome", [succeeded(), failed(FaultClass.POD)])
def test_an_attempt_that_ended_while_nobody_looked_counts_up_to_its_end(outcome):
    story = Story("corpus")
    story.at(0)
    over = replace(ended(story.attempt, outcome), ended_at=START + timedelta(seconds=25))
    story.at(90_000, over)
    assert story.active == 25


def test_active_time_is_kept_to_the_millisecond():
    story = Story("corpus")
    story.at(0)
    story.at(25.12364, ended(story.attempt, succeeded()))
    assert story.stage.active_seconds == 25.124


def test_a_server_is_active_until_it_answers():
    digest, story = succeeded(), Story("corpus", "tok", "tokens", "base", "ship", "serve")
    story.at(0)
    for end in (10, 20, 30, 40, 50):
        story.at(end, ended(story.attempt, digest))
    progress = Progress(stage="serve", attempt=1, endpoint="http://127.0.0.1:8000", time=START)
    story.at(62, replace(story.attempt, progress=progress))
    story.at(9_000)
    assert (story.stage.state, story.active) == (StageState.SUCCEEDED, 12)


def test_an_edited_stage_begins_to_count_again():
    story = Story("corpus")
    story.at(0)
    story.at(100, ended(story.attempt, succeeded()))
    story.run = make_run("corpus", seed=7, status=story.run.status)
    story.at(200)
    story.at(203)
    assert story.active == 3
