"""Which rank explains how a pod ended, from what the ranks and torchrun left."""

import json

import pytest

from headrace_api.faults import ExitCode, FaultClass, Outcome
from headrace_trainer.agent.outcomes import FIRST_FAILURE_FILE, exit_code_of, explain

CLOSED = Outcome(fault=FaultClass.PROCESS, reason="RuntimeError", message="connection closed by peer", rank=0)
BAD_DATA = Outcome(fault=FaultClass.USER, reason="UserError", message="bad document", rank=1)
SAVED = Outcome(fault=FaultClass.STOPPED, reason="Stopped", message="saved", step=7, rank=0)
DONE = Outcome(artifact_digest="ab")


def leave(scratch, *said, first_failure=None):
    (scratch / "outcomes").mkdir()
    for rank, outcome in enumerate(said):
        record = {"time": float(rank), "outcome": json.loads(outcome.model_dump_json(by_alias=True))}
        (scratch / "outcomes" / f"{rank}.json").write_text(json.dumps(record))
    if first_failure is not None:
        rank, code = first_failure
        (scratch / FIRST_FAILURE_FILE).write_text(json.dumps({"rank": rank, "pid": 1, "exitCode": code}))


@pytest.mark.parametrize(
    ("said", "first_failure", "exit_code", "stopping", "reason", "rank", "ends_with"),
    [
        ([Outcome(), DONE], None, 0, False, "Succeeded", None, ExitCode.OK),
        ([CLOSED, BAD_DATA], (0, 1), 1, False, "UserError", 1, ExitCode.USER),
        ([CLOSED], (3, -9), 1, False, "RankKilled", 3, ExitCode.PROCESS),
        ([], None, -15, False, "RankKilled", 0, ExitCode.PROCESS),
        ([CLOSED], (0, 1), 1, False, "RuntimeError", 0, ExitCode.PROCESS),
        ([SAVED, CLOSED], (1, 1), 1, True, "Stopped", 0, ExitCode.STOPPED),
        ([], None, 1, True, "KilledWhileStopping", None, ExitCode.PROCESS),
        ([], None, 3, False, "RanksFailed", None, ExitCode.PROCESS),
    ],
    ids=[
        *("success", "bad data explains closed connections", "a killed rank explains them too", "without torchrun"),
        *("an error of its own", "a stop that was saved", "no word within the grace period", "no word at all"),
    ],
)
def test_who_explains_the_end(tmp_path, said, first_failure, exit_code, stopping, reason, rank, ends_with):
    leave(tmp_path, *said, first_failure=first_failure)
    outcome = explain(tmp_path, exit_code=exit_code, stopping=stopping)
    assert (outcome.reason, outcome.rank) == (reason, rank)
    assert exit_code_of(outcome) == ends_with


def test_success_names_the_artifact(tmp_path):
    leave(tmp_path, Outcome(), DONE)
    assert explain(tmp_path, exit_code=0, stopping=False).artifact_digest == "ab"


def test_a_rank_ended_by_sigkill_may_have_run_out_of_memory(tmp_path):
    leave(tmp_path, first_failure=(2, -9))
    message = explain(tmp_path, exit_code=1, stopping=False).message
    assert message == "rank 2 was ended by SIGKILL; if nobody did that, it may have run out of memory"
