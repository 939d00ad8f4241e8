"""The status: Running means running, waiting states its reason, and fields of other versions survive."""

import copy
from typing import Any

import pytest

from builders import START, failed, make_run, succeeded
from headrace_api.errors import parse_run
from headrace_api.faults import FaultClass
from headrace_api.run import RunStatus, StageState, as_object
from headrace_operator.brain.observed import AttemptState, Held
from plan.body import Body, body

NO_ROOM = Held(reason="Unschedulable", message="0/4 nodes have room")
PENDING, RUNNING = AttemptState.PENDING, AttemptState.RUNNING


@pytest.mark.parametrize(
    ("seen", "phase", "summary", "said"),
    [
        ({"state": PENDING, "missing": "0 of 2 pods exist"}, None, "Starting", "Starting: 0 of 2 pods exist"),
        ({"state": PENDING, "missing": "1 of 2 pods run"}, "Starting", "Starting", "Starting: 1 of 2 pods run"),
        (
            {"state": PENDING, "missing": "1 of 2 pods run", "held": NO_ROOM},
            "Starting",
            "Waiting",
            "Waiting: Unschedulable: 0/4 nodes have room",
        ),
        ({"state": RUNNING}, None, "Starting", "Starting: its ranks have not joined yet"),
        ({"state": RUNNING}, "Starting", "Starting", "Starting: its ranks have not joined yet"),
        ({"state": RUNNING}, "Loading", "Running", "Loading"),
        ({"state": RUNNING}, "Running", "Running", "Running"),
    ],
)
def test_a_run_is_running_once_every_pod_runs_and_the_ranks_have_joined(seen, phase, summary, said):
    it = body("corpus")
    it.see(**seen)
    if phase is not None:
        it.report(phase=phase)
    assert (it.run.status.summary, it.run.status.phase_message) == (summary, said)
    assert it.state("corpus").value == summary


def test_one_that_runs_goes_on_running_when_a_new_leader_has_no_report_yet():
    it = body("corpus")
    it.report(phase="Running")
    it.see(progress=None)
    assert it.run.status.summary == "Running"


def test_each_attempt_starts_anew():
    it = body("corpus")
    it.report(phase="Running")
    it.end(failed(FaultClass.PROCESS))
    assert it.run.status.summary == "Starting"
    it.step()
    assert it.run.status.summary == "Starting"
    it.report(phase="Running", done=1)
    assert it.run.status.summary == "Running"


LATER = {
    "summary": "Draining",
    "ledger": {"goodput": 0.97, "lost": [{"step": 3}]},
    "conditions": [
        {"type": "GoodputMet", "status": "Unknown", "reason": "TooEarly", "lastTransitionTime": "2026-01-01T00:00:00Z"},
        {
            "type": "Complete",
            "status": "False",
            "reason": "StagesUnfinished",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
            "observedGeneration": 4,
        },
    ],
    "checkpoint": {"step": 3, "uri": "/c", "time": "2026-01-01T00:00:00Z", "bytes": 12},
    "stage": "tok",
    "stages": [
        {
            "name": "corpus",
            "state": "Succeeded",
            "attempt": 1,
            "settled": 1,
            "suspects": ["node-7"],
            "artifact": {"uri": "/store/corpus", "digest": "c", "kind": "corpus", "bytes": 7},
        },
        {"name": "tok", "state": "Rehearsing", "attempt": 2, "settled": 1, "suspects": []},
    ],
}


def with_status(status: dict[str, Any]) -> Body:
    """The run with a status that another version wrote, its hashes those of this spec."""
    done = body("corpus", "tok")
    done.end(succeeded("c"))
    status = copy.deepcopy(status)
    for stage, ours in zip(status["stages"], done.run.status.stages, strict=True):
        stage["hash"] = ours.hash
    run = parse_run({**as_object(make_run("corpus", "tok")), "status": status})
    return Body(run=run, attempts={}, made=10)


def test_what_a_newer_operator_wrote_is_kept_and_does_not_stop_the_run():
    it = with_status(LATER)
    it.step()
    assert it.started() == [("tok", 2)], "an attempt in a state that is not known is followed"
    for outcome in (failed(FaultClass.PROCESS), succeeded("t")):
        it.end(outcome)
    written = it.run.status.dump()
    assert written["summary"] == "Complete"
    assert written["ledger"] == LATER["ledger"]
    assert [s.get("suspects") for s in written["stages"]] == [["node-7"], []]
    assert written["stages"][0]["artifact"]["bytes"] == 7
    conditions = {c["type"]: c for c in written["conditions"]}
    assert conditions["GoodputMet"]["status"] == "Unknown"
    assert (conditions["Complete"]["status"], conditions["Complete"]["observedGeneration"]) == ("True", 4)


def test_a_checkpoint_keeps_what_a_newer_operator_knew_of_it():
    it = with_status(LATER)
    it.step()
    assert it.run.status.dump()["checkpoint"]["bytes"] == 12


@pytest.mark.parametrize(
    "broken",
    [
        {"stages": "none"},
        {"stages": [{"state": "Running"}]},
        {"stages": [{"name": "corpus", "attempt": "many", "state": 7, "retryAt": "soon"}]},
        {"conditions": [{"type": "Complete"}]},
        {"checkpoint": {"step": -1}, "restarts": "x", "observedGeneration": {}},
        {"restarts": float("inf"), "observedGeneration": 2**200},
    ],
)
def test_a_status_that_does_not_parse_counts_as_unset(broken):
    run = parse_run({**as_object(make_run("corpus")), "status": broken})
    it = Body(run=run)
    it.step()
    assert it.started() == [("corpus", 1)]
    assert it.run.status.summary == "Starting"


def test_a_status_survives_its_own_json():
    it = body()
    for digest in "cts":
        it.end(succeeded(digest))
    it.report(phase="Running", checkpoint={"step": 3, "uri": "/c", "time": START})
    assert RunStatus.model_validate(it.run.status.dump()) == it.run.status
    assert it.state("base") is StageState.RUNNING
