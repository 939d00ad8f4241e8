"""Every kind of failure, repeated: reported, backed off, charged once, and bounded."""

from dataclasses import replace
from datetime import timedelta

import pytest
from pydantic import ValidationError

from builders import START, ended, failed, succeeded
from headrace_api.faults import FaultClass, Outcome
from headrace_api.run import StageState
from headrace_operator.brain.observed import AttemptState, Held
from plan.body import Body, body

BUDGET = 3
POLICY = {"maxInfraRestarts": BUDGET, "maxUserRestarts": BUDGET}
REFUSED = failed(FaultClass.POD, reason="StartRefused", message="422 Invalid: no such field")


def lose_the_outcome(it: Body) -> None:
    it.end(succeeded(digest=None))
    it.step(after_seconds=31)


def never_start(it: Body) -> None:
    since = START + timedelta(seconds=it.seconds)
    it.see(state=AttemptState.PENDING, held=Held(reason="ErrImagePull", message="no such image", since=since))
    it.step(after_seconds=601)
    it.end(failed(FaultClass.STOPPED))


def vanish(it: Body) -> None:
    it.step()
    del it.attempts[it.under_way()]
    it.step()


WAYS = {
    **{fault: lambda it, fault=fault: it.end(failed(fault)) for fault in FaultClass if fault != FaultClass.CAPACITY},
    "its outcome is lost": lose_the_outcome,
    "all of the attempt's pods are gone": lambda it: it.see(state=AttemptState.FAILED),
    "it is removed from outside": vanish,
    "its start is refused": lambda it: it.refuse(REFUSED),
    "a container never starts": never_start,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_whatever_goes_wrong_again_and_again_is_charged_backed_off_and_ends(way):
    it, waited = body("corpus", restartPolicy=POLICY), 0.0
    for failures in range(1, BUDGET + 1):
        way(it)
        while not it.started():
            assert it.run.status.summary in ("Restarting", "Stopping")
            waited += it.last.requeue_after_seconds
            it.step(after_seconds=it.last.requeue_after_seconds)
        assert it.run.status.restarts == failures
        assert it.status("corpus").attempt == failures + 1
    way(it)
    assert it.state("corpus") is StageState.FAILED
    assert it.started() == []
    assert waited >= 2 + 4, "the second and third restart wait"


def test_a_stop_that_was_asked_for_costs_nothing_however_it_ends():
    it = body("corpus", restartPolicy={"maxInfraRestarts": 0})
    for number, outcome in enumerate([failed(FaultClass.STOPPED), failed(FaultClass.PROCESS)], start=1):
        it.change(suspend=True)
        it.step()
        it.change(suspend=False)  # before the pods have gone
        it.step()
        assert (it.stopped(), it.started()) == ([("corpus", number)], [])
        it.end(outcome)
        assert it.started() == [("corpus", number + 1)]
    assert it.run.status.restarts == 0


def test_an_attempt_that_finishes_while_it_is_stopped_has_finished():
    it = body("corpus", "tok")
    it.change(suspend=True)
    it.step()
    it.change(suspend=False)
    it.end(succeeded("c"))
    assert it.state("corpus") is StageState.SUCCEEDED
    assert it.started() == [("tok", 1)]


def test_a_job_that_is_complete_before_its_pods_are_is_not_run_again():
    it = body("corpus", "tok")
    decided = it.see(state=AttemptState.SUCCEEDED, outcome=None)
    assert it.started() == [] and decided.requeue_after_seconds == 30
    assert "its outcome is still to come" in it.run.status.phase_message
    it.step(after_seconds=29)
    assert it.started() == []
    it.end(succeeded("c"))
    assert it.started() == [("tok", 1)]
    assert it.run.status.restarts == 0


def test_a_stage_that_fails_for_want_of_an_outcome_waits_for_none():
    it = body("corpus", restartPolicy={"maxInfraRestarts": 0})
    lose_the_outcome(it)
    status = it.status("corpus")
    assert (status.state, status.reason, status.outcome_due_at) == (StageState.FAILED, "OutcomeLost", None)


def test_an_outcome_is_waited_for_anew_after_a_suspension():
    it = body("corpus")
    it.see(state=AttemptState.SUCCEEDED)
    for suspend in (True, False):
        it.change(suspend=suspend)
        it.step(after_seconds=60)
    assert it.started() == [("corpus", 2)]
    decided = it.see(state=AttemptState.SUCCEEDED)
    assert (decided.requeue_after_seconds, it.run.status.restarts) == (30, 0)


def test_an_attempt_that_fails_without_a_word_is_said_to_have_lost_its_pods():
    it = body("corpus")
    it.see(state=AttemptState.FAILED)
    status = it.status("corpus")
    assert (status.reason, status.message) == ("Vanished", "all of the attempt's pods are gone")


def test_an_attempt_of_another_spec_that_has_the_number_of_the_next_is_not_taken_for_it():
    it = body("corpus")
    it.attempts["corpus", 1] = replace(ended(it.attempts["corpus", 1], succeeded("theirs")), hash="of-another-spec")
    it.step()
    assert (it.started(), it.run.status.restarts) == ([("corpus", 2)], 1)
    status = it.status("corpus")
    assert (status.reason, status.message) == ("Vanished", "the attempt and all of its pods are gone")


def test_an_outcome_that_is_lost_is_waited_for_once_and_not_for_ever():
    it = body("corpus")
    it.see(state=AttemptState.SUCCEEDED)
    for _ in range(6):
        it.step(after_seconds=5)
    assert it.started() == [("corpus", 2)]
    status = it.status("corpus")
    assert (status.infra_restarts, status.reason, status.outcome_due_at) == (1, "OutcomeLost", None)


@pytest.mark.parametrize("state", AttemptState)
def test_another_job_of_the_same_name_neither_fails_nor_finishes_a_stage(state):
    it = body("corpus", restartPolicy={"maxInfraRestarts": 1})
    it.step()
    said = {AttemptState.SUCCEEDED: succeeded("theirs"), AttemptState.FAILED: failed(FaultClass.USER)}
    it.see(uid="of-another", state=state, outcome=said.get(state))
    assert it.status("corpus").reason == "Vanished"
    assert it.status("corpus").artifact is None
    if state not in said:
        assert [key.uid for key in it.last.stop] == ["of-another"]
        it.end(failed(FaultClass.USER))
    assert (it.started(), it.run.status.restarts) == ([("corpus", 2)], 1)


@pytest.mark.parametrize("again", [failed(FaultClass.PROCESS), failed(FaultClass.USER), succeeded(digest=None)])
def test_a_ghost_of_a_charged_attempt_costs_nothing_more(again):
    it = body("corpus", restartPolicy={"maxInfraRestarts": 2, "maxUserRestarts": 2})
    it.end(failed(FaultClass.STORAGE))
    it.end(failed(FaultClass.STORAGE))
    ghosts = {key: ended(attempt, again) for key, attempt in it.attempts.items()}
    for _ in range(3):
        it.attempts = dict(ghosts)
        it.step()
    assert (it.run.status.restarts, it.status("corpus").attempt) == (2, 2)
    it.step(after_seconds=60)
    assert it.started() == [("corpus", 3)]


def test_a_refused_start_is_a_failure_with_the_servers_words():
    it = body("corpus", restartPolicy={"maxInfraRestarts": 0})
    it.refuse(REFUSED)
    assert it.run.status.summary == "Failed"
    assert it.status("corpus").message == "422 Invalid: no such field"


def test_a_quota_is_waited_for_in_sight_and_costs_nothing():
    it = body("corpus", restartPolicy={"maxInfraRestarts": 0})
    for _ in range(50):
        it.refuse(Outcome(fault=FaultClass.CAPACITY, reason="QuotaExceeded", message="requested: pods=1"))
        assert it.started() == [("corpus", 1)], "it is tried again"
        assert it.last.requeue_after_seconds == 15
        assert it.run.status.summary == "Waiting"
        assert it.run.status.phase_message == "Waiting: QuotaExceeded: requested: pods=1"
    assert it.step(after_seconds=1000).requeue_after_seconds == 100, "less and less often"
    assert it.step(after_seconds=10**6).requeue_after_seconds == 300
    it.refusals = ()
    it.step()
    assert it.state("corpus") is StageState.STARTING
    assert it.run.status.restarts == 0


def test_an_attempt_that_was_refused_in_part_is_stopped_before_the_next_starts():
    it = body("corpus")
    decided = it.refuse(REFUSED, in_part=True)
    assert (it.stopped(), it.started(), decided.requeue_after_seconds) == ([("corpus", 1)], [], 5)
    assert it.run.status.summary == "Restarting"
    it.step()
    assert it.run.status.summary == "Stopping"
    it.end(failed(FaultClass.STOPPED))
    assert it.started() == [("corpus", 2)]
    assert it.run.status.restarts == 1


def test_an_attempt_that_was_refused_in_part_and_finishes_all_the_same_has_finished():
    it = body("corpus", "tok")
    it.refuse(REFUSED, in_part=True)
    it.step()
    it.refusals = ()
    it.end(succeeded("c"))
    status = it.status("corpus")
    assert (status.state, status.retry_at, it.started()) == (StageState.SUCCEEDED, None, [("tok", 1)])


def test_an_attempt_that_a_quota_refused_in_part_waits_for_the_rest_and_says_so():
    it = body("corpus", restartPolicy={"maxInfraRestarts": 0})
    decided = it.refuse(Outcome(fault=FaultClass.CAPACITY, reason="QuotaExceeded", message="pods=1"), in_part=True)
    assert (it.started(), it.stopped(), decided.requeue_after_seconds) == ([("corpus", 1)], [], 15)
    assert (it.run.status.summary, it.run.status.phase_message) == ("Waiting", "Waiting: QuotaExceeded: pods=1")


def test_a_finished_stage_stops_whatever_else_of_it_still_runs():
    it = body("corpus", "tok")
    it.attempts["corpus", 5] = replace(it.attempts["corpus", 1], number=5, uid="stranger")
    it.attempts["corpus", 1] = ended(it.attempts["corpus", 1], succeeded("c"))
    for _ in range(2):
        it.step()
        assert (it.state("corpus"), it.stopped()) == (StageState.SUCCEEDED, [("corpus", 5)])


def test_a_finished_stage_stays_so_while_an_earlier_one_is_made_again_and_a_stranger_of_it_is_stopped():
    it = body("corpus", "tok")
    it.end(succeeded("c"))
    it.end(succeeded("t"))
    it.attempts["tok", 5] = replace(it.attempts["tok", 1], number=5, uid="stranger", state=AttemptState.RUNNING)
    it.change(seed=7)
    it.step()
    assert (it.started(), it.stopped(), it.state("tok")) == ([("corpus", 2)], [("tok", 5)], StageState.SUCCEEDED)


def test_what_was_refused_in_part_is_taken_down_when_the_budget_is_spent():
    it = body("corpus", restartPolicy={"maxInfraRestarts": 0})
    it.refuse(REFUSED, in_part=True)
    assert (it.state("corpus"), it.stopped()) == (StageState.FAILED, [("corpus", 1)])


def test_attempts_that_nobody_knows_of_end_first_and_are_named():
    it = body("corpus")
    for number in (5, 6):
        stranger = replace(it.attempts["corpus", 1], number=number, uid=f"stranger-{number}")
        it.attempts["corpus", number] = stranger
    it.step()
    assert (it.stopped(), it.started()) == ([("corpus", 5), ("corpus", 6)], [])
    assert it.run.status.phase_message == "Stopping: attempt 5 and 6 saves and exits"
    assert it.run.status.restarts == 0


def test_waiting_for_a_node_takes_any_time_and_is_said():
    it = body("corpus")
    it.see(state=AttemptState.PENDING, held=Held(reason="Unschedulable", message="0/4 nodes have room"))
    it.step(after_seconds=10**6)
    assert it.started() == [("corpus", 1)]
    assert it.run.status.phase_message == "Waiting: Unschedulable: 0/4 nodes have room"
    assert it.run.status.restarts == 0


def test_an_image_that_cannot_be_pulled_is_said_at_once_and_given_up_after_ten_minutes():
    it = body("corpus")
    held = Held(reason="ErrImagePull", message="no such image", since=START)
    decided = it.see(state=AttemptState.PENDING, held=held)
    assert it.run.status.phase_message == "Waiting: ErrImagePull: no such image"
    assert decided.requeue_after_seconds == 600
    it.step(after_seconds=600)
    assert it.stopped() == [("corpus", 1)]
    status = it.status("corpus")
    assert (it.run.status.restarts, status.reason, status.message) == (1, "ErrImagePull", "no such image")


def test_a_server_that_ends_by_itself_is_charged_as_a_failure():
    it = body("corpus", "tok", "tokens", "base", "ship", "serve", restartPolicy={"maxInfraRestarts": 1})
    for digest in "ctsbx":
        it.end(succeeded(digest))
    it.end(succeeded(digest=None))
    assert it.started() == [("serve", 2)]
    it.end(succeeded(digest=None))
    assert it.run.status.summary == "Failed"


@pytest.mark.parametrize("ahead", [1, 59, 3600, 10**8])
def test_a_deadline_that_another_clock_wrote_is_never_waited_for_longer_than_the_longest_wait(ahead):
    it = body("corpus")
    it.end(failed(FaultClass.PROCESS))
    it.end(failed(FaultClass.PROCESS))
    later = START + timedelta(seconds=it.seconds + ahead)
    stages = [it.status("corpus").model_copy(update={"retry_at": later})]
    it.run = it.run.model_copy(update={"status": it.run.status.model_copy(update={"stages": stages})})
    waited = 0.0
    it.step()
    while not it.started():
        waited += it.last.requeue_after_seconds
        it.step(after_seconds=it.last.requeue_after_seconds)
    assert waited <= 61


def test_a_run_is_never_planned_again_at_once_even_if_the_timer_is_a_little_early():
    it = body("corpus")
    it.end(failed(FaultClass.PROCESS))
    decided = it.end(failed(FaultClass.PROCESS), after_seconds=0)
    assert it.step(after_seconds=decided.requeue_after_seconds - 1e-6).requeue_after_seconds >= 1


def test_a_figure_that_is_not_finite_is_left_out_and_the_outcome_still_reads():
    said = Outcome.model_validate_json('{"artifactDigest": "d", "metrics": {"loss": NaN, "tokens": 7, "x": Infinity}}')
    assert (said.artifact_digest, said.metrics) == ("d", {"tokens": 7})
    written = Outcome(artifact_digest="d", metrics={"loss": float("nan")}).model_dump_json()
    assert Outcome.model_validate_json(written).artifact_digest == "d"


def test_figures_that_are_no_block_of_names_are_refused():
    with pytest.raises(ValidationError, match="valid dictionary"):
        Outcome.model_validate({"metrics": [1.0]})


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_that_is_not_finite_is_not_shown(number):
    it = body("corpus")
    it.report(phase="Running", done=5, loss=number)
    assert it.run.status.loss is None


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), -1e300, 1e300])
def test_no_reported_number_can_break_a_plan(number):
    it = body("corpus")
    it.report(phase="Running", done=5, total=3, loss=number, tokensPerSecond=number, etaSeconds=number)
    assert it.run.status.progress == "100%"
    attempt = it.attempts["corpus", 1]
    raw = attempt.progress.model_copy(update={"eta_seconds": number, "tokens_per_second": number})
    it.attempts["corpus", 1] = replace(attempt, progress=raw)
    it.step()
