"""Servers: they roll over, wait for capacity, and stay up while unrelated stages change."""

from dataclasses import replace
from datetime import timedelta

import pytest

from builders import STAGES, START, ended, failed, succeeded
from headrace_api.faults import FaultClass
from headrace_api.run import ConditionType, StageState
from headrace_operator.brain.observed import AttemptState, Held
from plan.body import Body, body

HERE = "http://demo--serve.default.svc:8000"
NO_ROOM = Held(reason="Unschedulable", message="0/4 nodes have a GPU")


def serving(**spec: object) -> Body:
    """A complete run whose server answers."""
    it = body("corpus", "tok", "tokens", "base", "ship", "serve", **spec)
    for digest in "ctsbx":
        it.end(succeeded(digest))
    it.report(phase="Serving", endpoint=HERE)
    assert it.run.status.condition(ConditionType.COMPLETE)
    return it


def edit(it: Body, stage: str, **fields: object) -> None:
    """The user edits a stage's typed block, or its compute."""
    stages = it.run.spec.dump()["stages"]
    edited = next(s for s in stages if s["name"] == stage)
    kind = next(k for k in STAGES[stage] if k != "compute")
    for name, value in fields.items():
        (edited if name == "compute" else edited[kind])[name] = value
    it.change(stages=stages)
    it.step()


def test_an_edit_of_an_earlier_stage_leaves_the_old_server_up_until_the_new_model_is_ready():
    it = serving()
    edit(it, "ship", dtype="bf16")
    assert (it.stopped(), it.started()) == ([], [("ship", 2)])
    assert (it.run.status.endpoint, it.run.status.condition(ConditionType.COMPLETE)) == (HERE, False)
    it.end(succeeded("y"))
    assert (it.stopped(), it.started()) == ([], [("serve", 2)])
    assert it.last.start[0].inputs["model"].digest == "y"
    assert it.run.status.endpoint == HERE, "the old one answers meanwhile"
    it.report(phase="Serving", endpoint=HERE)
    assert it.run.status.condition(ConditionType.COMPLETE)
    assert it.stopped() == [("serve", 1)]


def test_the_same_model_made_again_leaves_the_server_as_it_is():
    it = serving()
    edit(it, "ship", dtype="bf16")
    edit(it, "ship", dtype="fp32")
    it.end(failed(FaultClass.STOPPED))
    it.end(succeeded("x"))
    assert (it.started(), it.run.status.condition(ConditionType.COMPLETE)) == ([("serve", 1)], True)


def test_a_change_of_replicas_is_applied_in_place():
    it = serving()
    edit(it, "serve", replicas=5)
    assert (it.stopped(), it.started()) == ([], [("serve", 1)])
    assert it.last.start[0].stage.deploy.replicas == 5
    assert it.run.status.condition(ConditionType.COMPLETE)


@pytest.mark.parametrize(
    ("field", "value"), [("port", 9000), ("compute", {"memory": "64Gi"})], ids=["its block", "its compute"]
)
def test_another_edit_of_a_server_rolls_over(field, value):
    it = serving()
    edit(it, "serve", **{field: value})
    assert (it.stopped(), it.started()) == ([], [("serve", 2)])
    assert it.run.status.restarts == 0
    it.step()
    assert it.started() == [("serve", 2)], "once"
    it.report(phase="Serving", endpoint=HERE)
    assert it.stopped() == [("serve", 1)]


def test_a_drain_does_not_take_completeness_back_and_is_said():
    it = serving()
    it.see(state=AttemptState.PENDING, held=NO_ROOM, progress=None)
    assert it.run.status.condition(ConditionType.COMPLETE)
    assert (it.run.status.summary, it.run.status.endpoint) == ("Complete", HERE)
    assert it.run.status.phase_message == "Waiting: Unschedulable: 0/4 nodes have a GPU"
    assert it.last.events == ()


def test_a_slow_start_waits_and_says_so():
    it = body("corpus", "tok", "tokens", "base", "ship", "serve", restartPolicy={"maxInfraRestarts": 0})
    for digest in "ctsbx":
        it.end(succeeded(digest))
    it.see(state=AttemptState.PENDING, held=NO_ROOM)
    it.step(after_seconds=86_400)
    assert it.run.status.summary == "Waiting"
    assert it.run.status.phase_message == "Waiting: Unschedulable: 0/4 nodes have a GPU"
    assert (it.started(), it.run.status.restarts) == ([("serve", 1)], 0)


def test_a_new_server_that_cannot_start_takes_no_old_one_down():
    it = serving(restartPolicy={"maxUserRestarts": 1})
    edit(it, "serve", port=9000)
    for attempt in (2, 3):
        assert it.started() == [("serve", attempt)]
        it.end(failed(FaultClass.USER, reason="BadModel"))
        assert it.stopped() == []
    assert (it.state("serve"), it.run.status.endpoint) == (StageState.FAILED, HERE)
    it.step()
    assert (it.stopped(), it.started()) == ([], [])
    edit(it, "serve", port=8000)
    assert it.started() == [("serve", 4)]
    it.report(phase="Serving", endpoint=HERE)
    assert it.run.status.condition(ConditionType.COMPLETE)
    assert ("serve", 1) in it.stopped()


def starting(*later: str, **spec: object) -> Body:
    """A run whose server starts."""
    it = body("corpus", "tok", "tokens", "base", "ship", "serve", *later, **spec)
    for digest in "ctsbx":
        it.end(succeeded(digest))
    return it


def test_a_stage_after_a_server_begins_once_that_answers_and_goes_on_while_it_is_drained():
    it = starting("eval")
    assert it.started() == [("serve", 1)]
    it.report(phase="Serving", endpoint=HERE)
    assert it.started() == [("serve", 1), ("eval", 1)]
    drained = replace(it.attempts["serve", 1], state=AttemptState.PENDING, held=NO_ROOM, progress=None)
    it.attempts["serve", 1] = drained
    it.step()
    assert (it.started(), it.stopped()) == ([("serve", 1), ("eval", 1)], [])
    said = "Starting: its ranks have not joined yet"
    assert (it.run.status.stage, it.run.status.phase_message) == ("eval", said), "of the stage that is under way"


def test_a_server_that_loads_goes_on_doing_so_when_a_new_leader_has_no_report_yet():
    it = starting()
    it.step()
    assert it.run.status.summary == "Starting" and it.run.status.phase_message.startswith("Starting: ")
    it.report(phase="Loading")
    it.see(progress=None)
    assert (it.run.status.summary, it.run.status.phase_message) == ("Running", None)


def test_a_server_that_could_never_start_is_taken_down_when_its_budget_is_spent():
    it = starting(restartPolicy={"maxInfraRestarts": 0})
    since = START + timedelta(seconds=it.seconds)
    it.see(state=AttemptState.PENDING, held=Held(reason="ErrImagePull", message="no such image", since=since))
    it.step(after_seconds=600)
    assert (it.state("serve"), it.stopped()) == (StageState.FAILED, [("serve", 1)])


def test_a_server_is_suspended_with_nothing_left_of_what_it_did_or_waited_for():
    it = serving(restartPolicy={"maxInfraRestarts": 5})
    it.change(suspend=True)
    it.step()
    assert it.run.status.phase_message == "Stopping: attempt 1 saves and exits, as suspend asks"
    it.end(failed(FaultClass.STOPPED))
    status = it.status("serve")
    assert (status.state, status.finished_at, status.endpoint) == (StageState.SUSPENDED, None, None)
    it.change(suspend=False)
    it.step()
    for _ in range(2):
        it.end(failed(FaultClass.PROCESS))
    assert it.started() == [] and it.status("serve").retry_at is not None
    it.change(suspend=True)
    it.step()
    assert (it.state("serve"), it.status("serve").retry_at) == (StageState.SUSPENDED, None)
    assert ("serve", 3) in it.stopped(), "its Deployment would start it again and again"


@pytest.mark.parametrize("made_again", [False, True], ids=["while all is done", "while its model is made again"])
def test_suspending_takes_a_server_down_and_resuming_brings_it_back(made_again):
    it = serving()
    if made_again:
        edit(it, "ship", dtype="bf16")
    it.change(suspend=True)
    it.step()
    assert ("serve", 1) in it.stopped()
    for key in [k for k, a in it.attempts.items() if a.state is AttemptState.STOPPING]:
        del it.attempts[key]
    it.step()
    assert (it.run.status.summary, it.run.status.endpoint) == ("Suspended", None)
    it.change(suspend=False)
    it.step()
    if made_again:
        it.end(succeeded("y"))
    assert it.started() == [("serve", 2)]
    assert it.run.status.restarts == 0


def test_a_server_that_failed_for_good_has_no_address():
    it = serving(restartPolicy={"maxInfraRestarts": 0})
    it.end(failed(FaultClass.PROCESS))
    assert (it.state("serve"), it.status("serve").endpoint) == (StageState.FAILED, None)


def test_a_server_that_ended_as_its_spec_was_edited_leaves_no_address_to_the_next():
    it = serving()
    it.attempts["serve", 1] = ended(it.attempts["serve", 1], failed(FaultClass.PROCESS))
    edit(it, "serve", port=9000)
    assert (it.started(), it.status("serve").endpoint) == ([("serve", 2)], None)


def test_a_server_that_is_removed_from_outside_is_charged_and_comes_back():
    it = serving()
    del it.attempts["serve", 1]
    it.step()
    assert (it.started(), it.run.status.restarts) == ([("serve", 2)], 1)
    assert not it.run.status.condition(ConditionType.COMPLETE)
