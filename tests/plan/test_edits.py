"""A running attempt is frozen: an edit, and only an edit, stops it and takes the next one."""

import pytest

from builders import STAGES, ended, failed, succeeded
from headrace_api.faults import FaultClass
from headrace_api.run import ConditionType, StageState
from headrace_operator.brain.observed import AttemptState
from plan.body import Body, body


def training(**spec: object) -> Body:
    """A run of generation 1 whose pretraining is under way."""
    it = body("corpus", "tok", "tokens", "base", **spec)
    it.generation(1)
    for digest in "cts":
        it.end(succeeded(digest))
    it.report(phase="Running", done=7)
    return it


def edit_base(it: Body, **fields: object) -> None:
    """The user edits the pretrain stage's block."""
    stages = it.run.spec.dump()["stages"]
    stages[3].update(fields)
    it.change(stages=stages)
    it.generation(it.run.metadata.generation + 1)


@pytest.mark.parametrize(
    "compute",
    [{"nodes": 2, "ranksPerNode": 2}, {"ranksPerNode": 2, "memory": "8Gi"}, {"ranksPerNode": 2, "cpu": "4"}],
    ids=["nodes", "memory", "cpu"],
)
def test_an_edit_of_compute_is_applied_by_the_next_attempt_at_no_cost(compute):
    it = training(restartPolicy={"maxInfraRestarts": 0})
    edit_base(it, compute=compute)
    it.step()
    assert (it.stopped(), it.started()) == ([("base", 1)], [])
    assert it.run.status.phase_message == "Stopping: attempt 1 saves and exits; the next one applies the edited spec"
    assert [e.reason for e in it.last.events] == ["AttemptStopping"]
    it.step()
    assert "the next one applies the edited spec" in it.run.status.phase_message
    it.end(failed(FaultClass.STOPPED))
    assert it.started() == [("base", 2)]
    assert it.last.start[0].stage.compute == it.run.spec.stages[3].compute
    assert it.run.status.restarts == 0


def test_the_status_says_which_spec_it_is_about_and_which_one_runs():
    """As kubectl wait reads it: a condition counts once observedGeneration is the object's generation."""
    it = training()
    edit_base(it, compute={"ranksPerNode": 2, "memory": "8Gi"})
    assert it.run.status.observed_generation == 1, "until it is planned, what is said is about the old spec"
    it.step()
    assert (it.run.status.observed_generation, it.status("base").generation) == (2, 1)
    assert not it.run.status.condition(ConditionType.COMPLETE)
    it.end(failed(FaultClass.STOPPED))
    assert (it.run.status.observed_generation, it.status("base").generation) == (2, 2)


@pytest.mark.parametrize(
    "spec",
    [{"restartPolicy": {"maxInfraRestarts": 50}}, {"suspend": False}],
    ids=["a budget", "what it was already"],
)
def test_an_edit_that_changes_nothing_of_the_attempt_leaves_it_alone(spec):
    it = training()
    it.change(**spec)
    it.generation(2)
    it.step()
    assert (it.stopped(), it.started()) == ([], [("base", 1)])
    assert it.status("base").generation == 2, "it is what the new spec asks for too"


def test_an_edit_of_a_later_stage_leaves_the_running_one_alone():
    it = body("corpus", "tok")
    it.generation(1)
    it.step()
    stages = [{"name": "corpus", **STAGES["corpus"]}, {"name": "tok", **STAGES["tok"], "compute": {"memory": "1Gi"}}]
    it.change(stages=stages)
    it.generation(2)
    it.step()
    assert (it.stopped(), it.started()) == ([], [("corpus", 1)])


@pytest.mark.parametrize("digest", ["of-an-older-version", ""])
def test_another_version_that_resolves_the_same_spec_otherwise_changes_nothing(digest):
    it = training()
    it.see(digest=digest)
    assert (it.stopped(), it.started(), it.run.status.summary) == ([], [("base", 1)], "Running")


def test_a_stage_whose_input_is_made_again_stops_and_then_waits_for_its_turn():
    it = training()
    it.change(seed=7)
    it.generation(2)
    it.step()
    assert (it.stopped(), it.started()) == ([("base", 1)], [("corpus", 2)])
    assert it.state("base") is StageState.STOPPING
    it.attempts["base", 1] = ended(it.attempts["base", 1], failed(FaultClass.STOPPED))
    it.step()
    assert (it.state("base"), it.run.status.restarts) == (StageState.PENDING, 0)
    for digest in ("c2", "t2", "s2"):
        it.end(succeeded(digest))
    assert (it.started(), it.state("base")) == ([("base", 2)], StageState.STARTING)


def test_a_stage_to_be_done_again_says_until_then_which_spec_its_last_attempt_was_of():
    it = body("corpus")
    it.generation(1)
    it.step()
    it.end(succeeded("c"))
    it.change(seed=7, suspend=True)
    it.generation(2)
    it.step()
    corpus = it.status("corpus")
    assert (corpus.state, corpus.artifact, corpus.generation) == (StageState.SUSPENDED, None, 1)


def test_another_runtime_is_an_edit_too():
    it = training()
    it.change(runtime="h200")
    it.generation(2)
    it.step()
    assert it.stopped() == [("base", 1)]
    it.end(failed(FaultClass.STOPPED))
    assert it.last.start[0].runtime == "h200"


def test_an_edit_that_is_taken_back_while_the_attempt_stops_goes_on_with_the_next():
    it = training()
    before = it.run.spec.stages[3].compute.dump()
    edit_base(it, compute={"nodes": 2, "ranksPerNode": 2})
    it.step()
    edit_base(it, compute=before)
    it.step()
    assert it.stopped() == [("base", 1)], "it was told to stop, and is doing so"
    it.end(failed(FaultClass.STOPPED))
    assert (it.started(), it.run.status.restarts) == ([("base", 2)], 0)


def test_an_edit_of_what_is_done_makes_nothing_again():
    it = training()
    it.end(succeeded("b"))
    edit_base(it, compute={"nodes": 2, "ranksPerNode": 2})
    it.step()
    assert (it.started(), it.run.status.summary, it.run.status.observed_generation) == ([], "Complete", 2)


def test_an_edit_gives_a_failed_stage_another_try():
    it = training(restartPolicy={"maxInfraRestarts": 0})
    it.end(failed(FaultClass.POD, reason="OOMKilled"))
    it.step()
    assert it.state("base") is StageState.FAILED
    edit_base(it, compute={"ranksPerNode": 2, "memory": "64Gi"})
    it.step()
    assert (it.started(), it.run.status.summary) == ([("base", 2)], "Starting")
    it.end(failed(FaultClass.POD))
    it.step()
    assert it.state("base") is StageState.FAILED, "its budget is as it was"


def test_a_failed_stage_stays_so_after_an_edit_of_something_else():
    it = training(restartPolicy={"maxInfraRestarts": 0})
    it.end(failed(FaultClass.POD))
    it.change(suspend=False)
    it.generation(2)
    it.step()
    assert it.state("base") is StageState.FAILED


def test_an_edit_of_a_run_that_waits_to_restart_is_in_the_next_attempt():
    it = training()
    it.end(failed(FaultClass.POD))
    it.end(failed(FaultClass.POD))
    assert it.started() == []
    edit_base(it, compute={"ranksPerNode": 2, "memory": "8Gi"})
    it.step(after_seconds=60)
    assert it.started() == [("base", 3)]
    assert it.last.start[0].stage.compute.memory == 8 * 2**30
    it.see(state=AttemptState.RUNNING)
    assert it.stopped() == []


def test_without_generations_as_on_a_laptop_every_difference_is_an_edit():
    it = body("corpus")
    it.step()
    stages = [{"name": "corpus", **STAGES["corpus"], "compute": {"memory": "1Gi"}}]
    it.change(stages=stages)
    it.step()
    assert it.stopped() == [("corpus", 1)]
