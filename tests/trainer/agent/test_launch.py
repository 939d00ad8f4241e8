"""How ranks start, how their ends are reported, and that none survives, whichever process is killed."""

import json
import signal

import pytest

from headrace_api.faults import ExitCode, FaultClass

STEPS = ["steps", 10_000]


def described(attempt):
    return [json.loads(path.read_text()) for path in sorted(attempt.folder.glob("rank-*.json"))]


def test_ranks_are_forked_from_one_process_that_has_imported_their_stage(pods):
    attempt = pods({"*": [["describe"]]}, nodes=2)
    assert [attempt.end(i).fault for i in range(2)] == [None, None]
    ranks = described(attempt)
    assert [(r["RANK"], r["LOCAL_RANK"]) for r in ranks] == [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")]
    assert {(r["WORLD_SIZE"], r["LOCAL_WORLD_SIZE"], r["MASTER_ADDR"]) for r in ranks} == {("4", "2", "127.0.0.1")}
    assert {r["MASTER_PORT"] for r in ranks} == {str(attempt.port)}
    for pod in (ranks[:2], ranks[2:]):
        assert len({r["pid"] for r in pod}) == 2
        assert len({r["parent"] for r in pod}) == 1
        assert all(r["imported_by"] == r["parent"] for r in pod)


def test_ranks_have_a_python_of_their_own_where_importing_has_started_a_thread(pods):
    attempt = pods({"import": "starts a thread", "*": [["describe"]]})
    assert attempt.end().fault is None
    assert [r["imported_by"] for r in described(attempt)] == [r["pid"] for r in described(attempt)]


def test_a_task_has_a_python_of_its_own(pods):
    attempt = pods({"*": [["describe"]]}, kind="corpus")
    assert attempt.end().fault is None
    (said,) = described(attempt)
    assert (said["imported_by"], said["RANK"]) == (said["pid"], None)


@pytest.mark.parametrize(
    ("script", "fault", "reason", "rank", "message", "code"),
    [
        (
            {"0": [STEPS], "1": [["kill_itself", "SIGKILL"]]},
            FaultClass.PROCESS,
            "RankKilled",
            1,
            "rank 1 was killed by SIGKILL",
            ExitCode.PROCESS,
        ),
        (
            {"0": [STEPS], "1": [["kill_itself", "SIGSEGV"]]},
            FaultClass.PROCESS,
            "RankKilled",
            1,
            "rank 1 was killed by SIGSEGV",
            ExitCode.PROCESS,
        ),
        (
            {"0": [["exit_with", 3]], "1": [STEPS]},
            FaultClass.PROCESS,
            "RanksFailed",
            0,
            "rank 0 exited with code 3 and left no outcome; see the log",
            ExitCode.PROCESS,
        ),
        (
            {"0": [["exit_with", 1]], "1": [["sleep", 1], ["fail", "bad document"]]},
            FaultClass.USER,
            "UserError",
            1,
            "bad document",
            ExitCode.USER,
        ),
        (
            {"0": [STEPS], "1": [["fill_the_disk"], ["steps", 5], ["write", "a"]]},
            FaultClass.STORAGE,
            "OSError",
            1,
            "OSError: [Errno 27] File too large",
            ExitCode.STORAGE,
        ),
        ({"import": "fails"}, FaultClass.PROCESS, "ImportError", None, "no such library", ExitCode.PROCESS),
    ],
    ids=[
        *("killed", "crashed", "silent", "the cause is told after the first failure"),
        *("no room for a word on the disk", "nothing to start"),
    ],
)
def test_how_a_pod_ended(pods, script, fault, reason, rank, message, code):
    attempt = pods(script)
    outcome = attempt.end()
    assert (outcome.fault, outcome.reason, outcome.rank) == (fault, reason, rank)
    assert outcome.message.startswith(message)
    assert attempt.agent.returncode == code
    assert attempt.everything() == []


@pytest.mark.parametrize(
    "script",
    [
        {"*": [["leave_a_session"]]},
        {"0": [["leave_a_session"], ["fail", "bad document"]], "1": [STEPS]},
        {"0": [["leave_a_session"], ["kill_itself", "SIGKILL"]], "1": [["leave_a_session"], STEPS]},
    ],
    ids=["after success", "after an error", "after a crash"],
)
def test_sessions_that_ranks_made_end_with_the_pod(pods, script):
    attempt = pods(script)
    attempt.end()
    assert attempt.everything() == []
    assert not attempt.scratch().exists()


@pytest.mark.parametrize("victim", ["agent", "launcher", "agent, then launcher"])
def test_nothing_is_left_whoever_is_killed(pods, victim):
    attempt = pods({"*": [["leave_a_session"], STEPS]})
    # Agent, launcher, two ranks, and the session of each.
    attempt.wait_for(lambda: attempt.done() > 3 and len(attempt.everything()) == 6)
    launcher = attempt.launcher()
    for name in victim.split(", then "):
        (launcher if name == "launcher" else attempt.agent).send_signal(signal.SIGKILL)
    if victim == "agent, then launcher":
        # Both at once: the ranks die with their parent; only in a pod, where the agent is process 1, does all else.
        attempt.wait_for(lambda: [p.name() for p in attempt.everything() if p.name().startswith("rank")] == [])
        return
    attempt.wait_for(lambda: attempt.everything() == [])
    if victim == "launcher":
        outcome = attempt.end()
        assert (outcome.reason, outcome.message) == ("RankKilled", "the launcher was killed by SIGKILL")


def test_an_agent_that_is_killed_while_ranks_are_imported_leaves_nothing(pods):
    attempt = pods({"import": "takes for ever"})
    attempt.wait_for(attempt.launcher)
    attempt.agent.kill()
    attempt.wait_for(lambda: attempt.everything() == [])


def test_a_finished_stage_is_found_while_ranks_are_imported(pods):
    attempt = pods({"*": [["steps", 3]]})
    made = attempt.end().artifact_digest
    assert made is not None
    attempt.start_again()
    outcome = attempt.end()
    assert (outcome.reason, outcome.artifact_digest) == ("AlreadyDone", made)
    assert attempt.everything() == []
