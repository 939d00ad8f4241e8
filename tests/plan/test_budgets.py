"""Budgets bound failures without progress in between; progress resets them, and the totals stay."""

import pytest

from builders import failed, succeeded
from headrace_api.faults import FaultClass, Outcome
from headrace_api.run import StageState
from headrace_operator.brain.backoff import backoff_seconds
from plan.body import Body, body

DAYS_3 = 3 * 86_400.0


def training(**policy: int) -> Body:
    """A run whose pretraining is under way."""
    it = body("corpus", "tok", "tokens", "base", restartPolicy=policy)
    for digest in "cts":
        it.end(succeeded(digest))
    return it


def fail_at(it: Body, step: int | None, *, fault: FaultClass = FaultClass.POD) -> None:
    """The running attempt reports a step and fails there; its successor is started."""
    if step is not None:
        it.report(phase="Running", done=step, total=10**6)
    it.end(failed(fault), after_seconds=0)
    it.step(after_seconds=it.last.requeue_after_seconds or 0)


@pytest.mark.parametrize("fault", [FaultClass.POD, FaultClass.STORAGE, FaultClass.STOPPED])
def test_eleven_faults_three_days_apart_are_not_a_failed_run(fault):
    it = training(maxInfraRestarts=3)
    for number in range(1, 12):
        it.seconds += DAYS_3
        fail_at(it, 1000 * number, fault=fault)
        assert it.started() == [("base", number + 1)]
    status = it.status("base")
    assert (status.infra_spent, status.infra_restarts, it.run.status.restarts) == (1, 11, 11)


@pytest.mark.parametrize(
    ("steps", "survives"),
    [
        ([0, 0, 0], False),
        ([50, 50, 50], False),
        ([50, 149, 248], False),
        ([50, 150, 250, 350, 450, 550], True),
        ([500, 20, 120], False),
        ([None, None, None], False),
    ],
    ids=[
        "at the first step each time",
        "at the same step each time",
        "one step short of new ground",
        "just far enough",
        "going over old ground again",
        "without a report",
    ],
)
def test_only_steps_beyond_the_furthest_failure_give_restarts_back(steps, survives):
    it = training(maxInfraRestarts=2, resetAfterSteps=100)
    for step in steps:
        fail_at(it, step)
    assert (it.state("base") is not StageState.FAILED) is survives


def test_the_step_that_only_the_outcome_tells_counts_too():
    it = training(maxInfraRestarts=1)
    for step in (150, 300, 450):
        it.end(Outcome(fault=FaultClass.PROCESS, reason="RankKilled", step=step))
        assert it.state("base") is not StageState.FAILED
        it.step(after_seconds=60)


def test_restarts_are_given_back_while_it_runs_so_that_people_see_it():
    it = training(maxInfraRestarts=3)
    fail_at(it, 40)
    fail_at(it, 40)
    it.report(phase="Running", done=139)
    assert it.status("base").infra_spent == 2
    it.report(phase="Running", done=140)
    assert (it.status("base").infra_spent, it.run.status.restarts) == (0, 2)


def test_documents_are_not_steps():
    it = body("corpus", restartPolicy={"maxInfraRestarts": 1})
    for number in (10**6, 2 * 10**6):
        it.report(phase="Running", done=number, unit="documents")
        it.end(failed(FaultClass.POD))
        it.step(after_seconds=60)
    assert it.state("corpus") is StageState.FAILED


def test_a_stage_that_succeeds_has_spent_nothing_and_the_total_stays():
    it = training(maxInfraRestarts=3)
    fail_at(it, 40)
    it.end(succeeded("b"))
    status = it.status("base")
    assert (status.infra_spent, status.infra_restarts, it.run.status.restarts) == (0, 1, 1)


@pytest.mark.parametrize(("fault", "total"), [(FaultClass.POD, (1, 0)), (FaultClass.USER, (0, 1))])
def test_an_edit_gives_fresh_budgets_and_keeps_the_total(fault, total):
    it = body("corpus", restartPolicy={"maxInfraRestarts": 1, "maxUserRestarts": 1})
    it.end(failed(fault))
    it.change(seed=7)
    it.step()
    it.end(failed(FaultClass.STOPPED))
    status = it.status("corpus")
    assert (status.infra_spent, status.user_spent, it.started()) == (0, 0, [("corpus", 3)])
    assert (status.infra_restarts, status.user_restarts) == total


def an_edit(it: Body) -> None:
    stages = it.run.spec.dump()["stages"]
    stages[-1]["compute"] = {"ranksPerNode": 2, "memory": "8Gi"}
    it.change(stages=stages)
    it.step()


def a_suspension(it: Body) -> None:
    for suspend in (True, False):
        it.change(suspend=suspend)
        it.step()


@pytest.mark.parametrize("rerun", [an_edit, a_suspension], ids=["edited", "suspended and resumed"])
def test_a_failed_stage_that_is_run_again_has_its_whole_budget_and_the_total_stays(rerun):
    it = training(maxInfraRestarts=2)
    for _ in range(3):
        fail_at(it, None)
    assert (it.state("base"), it.status("base").infra_spent) == (StageState.FAILED, 2)
    rerun(it)
    assert it.started() == [("base", 4)]
    for number in (5, 6):
        fail_at(it, None)
        assert it.started() == [("base", number)]
    fail_at(it, None)
    assert (it.state("base"), it.run.status.restarts) == (StageState.FAILED, 4)


@pytest.mark.parametrize(
    ("failures", "longest", "jitter", "seconds"),
    [
        (0, 60, 0.5, 0),
        (1, 60, 0, 2),
        (2, 60, 0.5, 3),
        (1, 60, 1, 1),
        (9, 60, 0, 60),
        (9, 60, 0.5, 45),
        (32, 1e12, 0, 2 * 2**30),
        (10**6, 1e12, 0, 2 * 2**30),
    ],
)
def test_a_back_off_doubles_within_bounds_and_jitter_takes_up_to_half_of_it(failures, longest, jitter, seconds):
    assert backoff_seconds(failures, first_seconds=2, longest_seconds=longest, jitter=jitter) == seconds


@pytest.mark.parametrize(("served_seconds", "survives"), [(30, False), (599, False), (600, True)])
def test_a_server_gets_its_restarts_back_by_answering_for_ten_minutes(served_seconds, survives):
    it = body("corpus", "tok", "tokens", "base", "ship", "serve", restartPolicy={"maxInfraRestarts": 2})
    for digest in "ctsbx":
        it.end(succeeded(digest))
    for _ in range(4):
        it.report(phase="Serving", endpoint="http://here")
        it.end(failed(FaultClass.PROCESS), after_seconds=served_seconds)
        it.step(after_seconds=60)
        if it.state("serve") is StageState.FAILED:
            break
    assert (it.state("serve") is not StageState.FAILED) is survives
