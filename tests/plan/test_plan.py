"""The planner, driven as a body drives it: plan, act, observe."""

from datetime import timedelta

import pytest

from builders import STAGES, START, ended, failed, make_run, succeeded
from headrace_api.artifact import ArtifactRef, stage_hash
from headrace_api.contract import ResolvedStage
from headrace_api.faults import FaultClass
from headrace_api.run import ConditionType, ObjectMeta, SavedCheckpoint, StageState
from headrace_api.stages import ArtifactKind
from headrace_operator.brain.observed import Attempt, AttemptState, Held, Observed
from headrace_operator.brain.plan import plan
from plan.body import body


def test_the_first_stage_starts_and_the_others_wait():
    it = body()
    assert it.started() == [("corpus", 1)]
    assert [s.state for s in it.run.status.stages] == [StageState.STARTING] + [StageState.PENDING] * 6


def test_planning_again_changes_nothing():
    it = body()
    it.step()  # sees what the first started
    before = it.run.status
    again = it.step()
    assert again.status == before
    assert again.events == ()
    assert it.started() == [("corpus", 1)]


def test_stages_follow_each_other_and_read_what_the_earlier_ones_left():
    it = body("corpus", "tok", "tokens")
    it.end(succeeded("c"))
    assert it.started() == [("tok", 1)]
    it.end(succeeded("t", vocabSize=4096))
    shards = it.last.start[0]
    assert {slot: ref.digest for slot, ref in shards.inputs.items()} == {"corpus": "c", "tokenizer": "t"}
    assert shards.inputs["tokenizer"].uri == "/store/tok"
    assert shards.output_uri == "/store/tokens"
    it.end(succeeded("s"))
    assert it.started() == []
    assert it.run.status.summary == "Complete"
    assert it.run.status.condition(ConditionType.COMPLETE)


def test_a_finished_stage_is_skipped_when_the_run_is_planned_again_from_its_status():
    it = body("corpus", "tok")
    it.end(succeeded("c"))
    it.attempts.clear()
    it.step()
    assert it.state("corpus") is StageState.SUCCEEDED
    assert it.started() == [("tok", 1)]


def test_an_edited_stage_and_what_reads_it_run_again_and_the_others_do_not():
    it = body("corpus", "tok", "tokens")
    for digest in ("c", "t", "s"):
        it.end(succeeded(digest))
    stages = [{"name": n, **STAGES[n]} for n in ("corpus", "tok", "tokens")]
    stages[1] = {"name": "tok", "tokenizer": {"from": {"corpus": "corpus"}, "vocabSize": 2048}}
    it.change(stages=stages)
    it.step()
    assert it.state("corpus") is StageState.SUCCEEDED
    assert it.started() == [("tok", 2)]
    it.end(succeeded("t2"))
    assert it.started() == [("tokens", 2)]


def test_the_same_result_of_an_earlier_stage_keeps_the_later_ones():
    it = body("corpus", "tok")
    it.end(succeeded("c"))
    it.end(succeeded("t"))
    corpus = it.run.status.stages[0].model_copy(update={"state": StageState.PENDING, "artifact": None, "hash": None})
    it.run = it.run.model_copy(
        update={"status": it.run.status.model_copy(update={"stages": [corpus, it.run.status.stages[1]]})}
    )
    it.step()
    assert it.started() == [("corpus", 2)]
    it.end(succeeded("c"))
    assert it.run.status.summary == "Complete"


def test_editing_a_stage_that_runs_stops_it_first():
    it = body("corpus")
    it.change(seed=7)
    it.step()
    assert [(k.stage, k.number) for k in it.last.stop] == [("corpus", 1)]
    assert it.started() == []
    it.end(failed(FaultClass.STOPPED))
    assert it.started() == [("corpus", 2)]


@pytest.mark.parametrize(
    ("fault", "policy", "restarts", "final"),
    [
        (FaultClass.PROCESS, {"maxInfraRestarts": 3}, 3, StageState.FAILED),
        (FaultClass.POD, {"maxInfraRestarts": 1}, 1, StageState.FAILED),
        (FaultClass.STORAGE, {"maxInfraRestarts": 0}, 0, StageState.FAILED),
        (FaultClass.USER, {"maxUserRestarts": 0}, 0, StageState.FAILED),
        (FaultClass.USER, {"maxUserRestarts": 1, "maxInfraRestarts": 0}, 1, StageState.FAILED),
    ],
)
def test_failures_are_retried_within_their_budget_and_fail_beyond_it(fault, policy, restarts, final):
    it = body("corpus", restartPolicy=policy)
    for expected in range(2, restarts + 2):
        it.end(failed(fault))
        it.seconds += 120
        it.step()
        assert it.started() == [("corpus", expected)]
    it.end(failed(fault, reason="Broken", message="the disk is gone"))
    assert it.state("corpus") is final
    assert it.started() == []
    assert it.run.status.restarts == restarts
    condition = next(c for c in it.run.status.conditions if c.type is ConditionType.FAILED)
    assert (condition.status, condition.reason, condition.message) == ("True", "Broken", "corpus: the disk is gone")


def test_budgets_are_counted_apart():
    it = body("corpus", restartPolicy={"maxInfraRestarts": 1, "maxUserRestarts": 1})
    it.end(failed(FaultClass.PROCESS))
    it.end(failed(FaultClass.USER))
    it.seconds += 120
    it.step()
    assert it.started() == [("corpus", 3)]
    status = it.run.status.stages[0]
    assert (status.infra_restarts, status.user_restarts) == (1, 1)


def test_the_waits_between_attempts_double_up_to_a_minute():
    it = body("corpus", restartPolicy={"maxInfraRestarts": 20})
    waits = []
    for _ in range(9):
        decided = it.end(failed(FaultClass.STORAGE))
        waits.append(decided.requeue_after_seconds or 0)
        if not it.started():
            assert it.run.status.summary == "Restarting"
            it.seconds += waits[-1]
            it.step()
        assert len(it.started()) == 1
    assert waits == [0, 2, 4, 8, 16, 32, 60, 60, 60]


def test_an_attempt_that_nobody_has_seen_yet_is_started_again_under_its_number():
    it = body("corpus")
    for _ in range(3):
        it.attempts.clear()
        it.step()
        assert it.started() == [("corpus", 1)]
    assert it.run.status.restarts == 0


def test_numbers_are_not_given_twice_when_the_status_was_lost():
    it = body("corpus")
    it.end(failed(FaultClass.PROCESS))
    it.run = make_run("corpus")
    it.attempts["corpus", 2] = ended(it.attempts["corpus", 2], failed(FaultClass.PROCESS))
    it.step()
    assert it.started() == [("corpus", 3)]


def test_suspending_stops_after_a_checkpoint_and_resuming_goes_on_with_the_next_attempt():
    it = body("corpus")
    it.change(suspend=True)
    it.step()
    assert it.state("corpus") is StageState.STOPPING
    assert it.run.status.summary == "Stopping"
    it.end(failed(FaultClass.STOPPED, message="saved step 12"))
    assert it.state("corpus") is StageState.SUSPENDED
    assert it.run.status.condition(ConditionType.SUSPENDED)
    it.change(suspend=False)
    it.step()
    assert it.started() == [("corpus", 2)]
    assert it.run.status.restarts == 0
    assert not it.run.status.condition(ConditionType.SUSPENDED)


def test_a_stage_that_finishes_while_it_is_suspended_is_done():
    it = body("corpus", "tok")
    it.change(suspend=True)
    it.step()
    it.end(succeeded("c"))
    assert it.state("corpus") is StageState.SUCCEEDED
    assert it.state("tok") is StageState.SUSPENDED


def test_a_stage_whose_turn_has_not_come_is_not_suspended():
    it = body("corpus", "tok", "tokens", "base", "ship", "serve")
    it.change(suspend=True)
    it.step()
    it.end(failed(FaultClass.STOPPED))
    assert [s.state for s in it.run.status.stages] == [StageState.SUSPENDED] + [StageState.PENDING] * 5
    assert [e.message for e in it.last.events] == ["corpus: after attempt 1"]


def test_a_suspended_stage_waits_for_its_turn_when_an_earlier_one_is_made_again():
    it = body("corpus", "tok")
    it.end(succeeded("c"))
    it.change(suspend=True)
    it.step()
    it.end(failed(FaultClass.STOPPED))
    assert it.state("tok") is StageState.SUSPENDED
    it.change(suspend=False, seed=7)
    it.step()
    assert (it.started(), it.state("tok")) == ([("corpus", 2)], StageState.PENDING)


def test_suspending_and_resuming_a_failed_run_gives_it_fresh_budgets():
    it = body("corpus", restartPolicy={"maxUserRestarts": 0})
    it.end(failed(FaultClass.USER))
    assert it.run.status.condition(ConditionType.FAILED)
    it.change(suspend=True)
    it.step()
    assert not it.run.status.condition(ConditionType.FAILED)
    assert it.status("corpus").finished_at is None
    it.change(suspend=False)
    it.step()
    assert it.started() == [("corpus", 2)]


def test_what_waits_to_restart_is_suspended_and_begins_at_once_when_resumed():
    it = body("corpus")
    for _ in range(2):
        it.end(failed(FaultClass.POD))
    assert it.run.status.summary == "Restarting"
    it.change(suspend=True)
    it.step()
    assert (it.state("corpus"), it.status("corpus").retry_at) == (StageState.SUSPENDED, None)
    it.change(suspend=False)
    it.step()
    assert it.started() == [("corpus", 3)]


def test_deleting_a_run_stops_everything_and_starts_nothing():
    it = body("corpus")
    meta = it.run.metadata.model_copy(update={"deletion_timestamp": START})
    it.run = it.run.model_copy(update={"metadata": meta})
    decided = it.step()
    assert decided.start == ()
    assert [(k.stage, k.number) for k in decided.stop] == [("corpus", 1)]


def test_attempts_of_a_stage_that_is_no_longer_in_the_spec_are_stopped():
    it = body("corpus")
    stranger = Attempt(stage="gone", number=4, hash="h", state=AttemptState.RUNNING)
    decided = plan(it.run, Observed(now=START, attempts=(*it.attempts.values(), stranger)))
    assert [(k.stage, k.number) for k in decided.stop] == [("gone", 4)]


def test_a_server_is_done_when_it_has_answered_and_is_kept_alive():
    it = body("corpus", "tok", "tokens", "base", "ship", "serve")
    for digest in "ctsbx":
        it.end(succeeded(digest))
    assert it.started() == [("serve", 1)]
    assert not it.run.status.condition(ConditionType.COMPLETE)
    it.report(phase="Serving", endpoint="http://127.0.0.1:8000")
    assert it.run.status.condition(ConditionType.COMPLETE)
    assert it.run.status.endpoint == "http://127.0.0.1:8000"
    assert it.started() == [("serve", 1)]
    it.end(failed(FaultClass.PROCESS))
    assert it.started() == [("serve", 2)]
    assert not it.run.status.condition(ConditionType.COMPLETE)


def test_only_the_newest_attempts_of_a_stage_are_kept():
    it = body("corpus", restartPolicy={"maxInfraRestarts": 50})
    for _ in range(6):
        it.end(failed(FaultClass.PROCESS))
        it.seconds += 120
        it.step()
    it.step()
    assert sorted(n for _, n in it.attempts) == [5, 6, 7]


@pytest.mark.parametrize("outcome", [succeeded("c"), failed(FaultClass.USER)], ids=["Complete", "Failed"])
def test_what_is_left_of_a_finished_runs_attempts_goes_after_its_time(outcome):
    it = body("corpus", ttlSecondsAfterFinished=600)
    it.end(outcome)
    assert it.last.requeue_after_seconds == 600
    it.step(after_seconds=599)
    assert (it.stopped(), it.last.requeue_after_seconds) == ([], 1)
    before = it.run.status
    it.step(after_seconds=1)
    assert it.stopped() == [("corpus", 1)]
    it.step(after_seconds=3600)
    assert (it.stopped(), it.started(), it.last.requeue_after_seconds) == ([], [], None)
    assert it.run.status == before, "the run knows what it has done"


def test_what_has_not_finished_is_kept_however_old_it_is():
    it = body("corpus", "tok", ttlSecondsAfterFinished=0)
    it.end(succeeded("c"))
    it.step(after_seconds=10**6)
    assert (it.stopped(), it.started()) == ([], [("tok", 1)])
    assert ("corpus", 1) in it.attempts, "nor was it stopped before"
    it.change(suspend=True)
    it.step()
    assert it.stopped() == [("tok", 1)]


def test_a_deployed_model_outlives_its_finished_run():
    it = body("corpus", "tok", "tokens", "base", "ship", "serve", ttlSecondsAfterFinished=60)
    for digest in "ctsbx":
        it.end(succeeded(digest))
    it.report(phase="Serving", endpoint="http://127.0.0.1:8000")
    it.step(after_seconds=61)
    assert ("serve", 1) not in it.stopped() and len(it.stopped()) == 5
    assert it.started() == [("serve", 1)]


def test_the_columns_show_the_newest_progress():
    it = body("corpus")
    saved = SavedCheckpoint(step=100, uri="/store/corpus/checkpoints/x", time=START)
    it.report(
        phase="Running", done=120, total=400, loss=3.21456, tokensPerSecond=12345.6, etaSeconds=200.4, checkpoint=saved,
    )  # fmt: skip
    status = it.run.status
    assert (status.step, status.progress, status.loss) == ("120/400", "30%", "3.2146")
    assert (status.tokens_per_second, status.eta) == ("12.3k", "3m20s")
    assert status.checkpoint is not None and status.checkpoint.step == 100


def test_the_newest_checkpoint_is_remembered_across_attempts():
    it = body("corpus")
    it.report(phase="Running", done=120, checkpoint=SavedCheckpoint(step=100, uri="/c", time=START))
    it.end(failed(FaultClass.PROCESS))
    assert it.run.status.checkpoint is not None and it.run.status.checkpoint.step == 100


def test_events_tell_of_transitions_only():
    it = body("corpus")
    assert [e.reason for e in it.last.events] == ["AttemptStarted"]
    it.end(failed(FaultClass.PROCESS, message="rank 1 was killed by SIGKILL"))
    assert [e.reason for e in it.last.events] == ["AttemptFailed", "AttemptStarted"]
    assert "rank 1 was killed by SIGKILL" in it.last.events[0].message
    it.step()
    assert it.last.events == ()
    it.end(succeeded("c", documentsOut=12))
    assert [(e.reason, e.message) for e in it.last.events] == [("StageSucceeded", "corpus: documentsOut=12")]


def test_a_failure_of_the_users_is_told_once_like_any_other():
    it = body("corpus", restartPolicy={"maxUserRestarts": 1})
    it.end(failed(FaultClass.USER))
    assert [e.reason for e in it.last.events] == ["AttemptFailed", "AttemptStarted"]
    it.step()
    assert it.last.events == ()


def test_the_figures_of_a_finished_stage_are_told_as_people_write_them():
    it = body("corpus")
    it.end(succeeded("c", b=1000, a=999.9, c=-2500, d=0.000123456))
    assert [e.message for e in it.last.events] == ["corpus: a=999.9, b=1k, c=-2.5k, d=0.0001235"]


def test_an_attempt_that_somebody_else_ends_is_said_to_stop_and_is_no_event():
    it = body("corpus")
    it.step()
    it.see(state=AttemptState.STOPPING)
    assert (it.state("corpus"), it.stopped(), it.last.events) == (StageState.STOPPING, [], ())
    assert it.run.status.phase_message is None


def test_a_finished_run_keeps_its_last_loss_and_no_other_column():
    it = body("corpus", "tok", "tokens", "base")
    for digest in "cts":
        it.end(succeeded(digest))
    it.report(phase="Running", done=489, total=489, loss=2.5, tokensPerSecond=9.0, etaSeconds=1.0)
    it.end(succeeded("b"))
    status = it.run.status
    assert (status.summary, status.stage, status.loss) == ("Complete", "base", "2.5000")
    rest = (status.step, status.progress, status.tokens_per_second, status.eta, status.phase_message)
    assert rest == (None,) * 5 and status.checkpoint is None


def test_a_long_reason_is_cut_to_what_a_status_may_hold():
    it = body("corpus")
    it.see(state=AttemptState.PENDING, held=Held(reason="Unschedulable", message="x" * 3000))
    assert it.run.status.phase_message == "Waiting: Unschedulable: " + "x" * 1000


def test_an_attempt_is_told_everything_but_secrets():
    it = body("corpus", "tok", storage={"uri": "s3://bucket/demo/"}, runtime="h100", restartPolicy={"onStall": "5m"})
    metadata = {"name": "demo", "namespace": "team", "uid": "uid-of-demo", "generation": 1}
    it.run = it.run.model_copy(update={"metadata": ObjectMeta.model_validate(metadata)})
    it.end(succeeded("c"))
    corpus, tok = it.run.spec.stages
    assert it.last.start == (
        ResolvedStage(
            run="demo",
            namespace="team",
            run_uid="uid-of-demo",
            runtime="h100",
            stage=tok,
            attempt=1,
            seed=1234,
            hash=stage_hash(tok.config, seed=1234, inputs={"corpus": "c"}),
            inputs={"corpus": ArtifactRef(uri="s3://bucket/demo/corpus", digest="c", kind=ArtifactKind.CORPUS)},
            storage=it.run.spec.storage,
            output_uri="s3://bucket/demo/tok",
            on_stall="5m",
        ),
    )
    assert it.status("corpus").hash == stage_hash(corpus.config, seed=1234, inputs={})


def test_conditions_keep_the_time_of_their_last_change():
    it = body("corpus", "tok")
    first = {c.type: c.last_transition_time for c in it.run.status.conditions}
    it.seconds = 60
    it.end(succeeded("c"))
    assert {c.type: c.last_transition_time for c in it.run.status.conditions} == first
    it.seconds = 90
    it.end(succeeded("t"))
    times = {c.type: c.last_transition_time for c in it.run.status.conditions}
    assert times[ConditionType.COMPLETE] == START + timedelta(seconds=90)
    assert times[ConditionType.FAILED] == START


def test_a_server_that_failed_for_good_is_taken_down():
    it = body("corpus", "tok", "tokens", "base", "ship", "serve", restartPolicy={"maxUserRestarts": 0})
    for digest in "ctsbx":
        it.end(succeeded(digest))
    it.end(failed(FaultClass.USER, message="no such engine"))
    assert it.run.status.condition(ConditionType.FAILED)
    assert (it.stopped(), it.started()) == ([("serve", 1)], [])


def test_only_the_last_of_the_servers_that_failed_is_taken_down():
    it = body("corpus", "tok", "tokens", "base", "ship", "serve", restartPolicy={"maxUserRestarts": 1})
    for digest in "ctsbx":
        it.end(succeeded(digest))
    for _ in range(2):
        it.end(failed(FaultClass.USER, message="no such engine"))
    assert (it.stopped(), it.started()) == ([("serve", 2)], []), "the pods of the others are kept for their logs"
