"""Small rules: whose report is accepted, when a status is written, which settings are valid."""

from datetime import UTC, datetime
from typing import Any

import pytest

from headrace_api.contract import Progress, ProgressReport
from headrace_api.errors import ManifestError
from headrace_operator.body.apply import StatusChange, status_change
from headrace_operator.body.caches import ProgressBook
from headrace_operator.body.pace import PROGRESS_WRITES_PER_SECOND, Pace
from headrace_operator.body.reconcile import is_complete, refused_status
from headrace_operator.body.records import PodRecord, pod_record
from headrace_operator.progress import PodIdentity, Refusal, check, identity
from headrace_operator.settings import Settings

Json = dict[str, Any]

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def review(*, authenticated: bool = True, audience: str = "headrace-progress", pod: bool = True) -> Json:
    bound = {f"authentication.kubernetes.io/pod-{k}": [v] for k, v in (("name", "pod-0"), ("uid", "uid-0"))}
    user = {"username": "system:serviceaccount:team:headrace--demo", "extra": bound if pod else {}}
    return {"status": {"authenticated": authenticated, "audiences": [audience], "user": user}}


WHO = PodIdentity(namespace="team", name="pod-0", uid="uid-0")


def test_a_good_review_names_the_pod() -> None:
    assert identity(review()) == WHO


@pytest.mark.parametrize(
    ("bad", "status", "said"),
    [
        ({"authenticated": False}, 401, "not valid"),
        ({"audience": "kubernetes"}, 401, "audience"),
        ({"pod": False}, 403, "not bound to a pod"),
    ],
)
def test_a_bad_review_is_refused(bad: Json, status: int, said: str) -> None:
    with pytest.raises(Refusal, match=said) as refused:
        identity(review(**bad))
    assert refused.value.status == status


def make_pod(**fields: str) -> PodRecord:
    labels = {"run": "demo", "run-uid": "u", "stage": "base", "attempt": "2"}
    given = {f"headrace.dev/{k}": fields.get(k.replace("-", "_"), v) for k, v in labels.items()}
    given["batch.kubernetes.io/job-completion-index"] = fields.get("index", "0")
    meta = {"namespace": "team", "name": "pod-0", "uid": fields.get("uid", "uid-0"), "resourceVersion": "1"}
    owners = [{"kind": "Job", "name": "j", "uid": "uid-j", "controller": "owner" not in fields}]
    return pod_record({"metadata": {**meta, "labels": given, "ownerReferences": owners}, "spec": {}, "status": {}})


def report(*, namespace: str = "team", run: str = "demo", stage: str = "base", attempt: int = 2) -> ProgressReport:
    return ProgressReport(namespace=namespace, run=run, progress=Progress(stage=stage, attempt=attempt, time=NOW))


def test_a_pods_own_report_is_taken() -> None:
    assert check(WHO, make_pod(), report()) == make_pod()


@pytest.mark.parametrize(
    ("pod", "told", "said"),
    [
        (None, report(), "does not belong to a run"),
        (make_pod(uid="uid-1"), report(), "does not belong to a run"),
        (make_pod(owner="nobody"), report(), "does not belong to a run"),
        (make_pod(), report(namespace="other"), "may not report for run other/demo"),
        (make_pod(), report(run="other"), "may not report for run team/other"),
        (make_pod(), report(stage="tok"), "stage tok"),
        (make_pod(), report(attempt=1), "attempt 1"),
        (make_pod(index="1"), report(), "only index 0"),
    ],
)
def test_another_report_is_not(pod: PodRecord | None, told: ProgressReport, said: str) -> None:
    with pytest.raises(Refusal, match=said) as refused:
        check(WHO, pod, told)
    assert refused.value.status == 403


@pytest.mark.parametrize(
    ("stored", "wanted", "change"),
    [
        ({"stage": "a", "step": "1"}, {"stage": "a", "step": "1"}, StatusChange.NONE),
        ({}, {"stage": "a"}, StatusChange.STATE),
        ({"stage": "a"}, {"stage": "b", "step": "1"}, StatusChange.STATE),
        ({"step": "1"}, {"step": "2"}, StatusChange.PROGRESS),
        ({"step": "1", "loss": "2.0"}, {"step": "1"}, StatusChange.PROGRESS),
        ({"metrics": {"loss": 2}}, {"metrics": {"loss": 2.0}}, StatusChange.NONE),
    ],
)
def test_how_statuses_differ(stored: Json, wanted: Json, change: StatusChange) -> None:
    assert status_change(stored, wanted) is change


def test_the_progress_of_few_runs_is_written_every_ten_seconds() -> None:
    pace = Pace(now=0.0)
    pace.written("a", now=100.0)
    assert pace.seconds_to_turn("a", now=102.0) == 8.0
    assert pace.seconds_to_turn("a", now=107.0) == 3.0, "it keeps its turn"
    pace.written("a", now=110.0)
    assert pace.seconds_to_turn("a", now=110.0) == 10.0
    assert pace.seconds_to_turn("b", now=110.0) <= 0.1, "another, that was written long ago, does not wait for it"


def test_the_progress_of_thousands_of_runs_is_written_at_a_rate_that_does_not_grow() -> None:
    pace, writes, now = Pace(now=0.0), 0, 0.0
    while now < 200:
        now += 2.0
        for i in range(5000):
            if pace.seconds_to_turn(f"run {i}", now=now) == 0:
                pace.written(f"run {i}", now=now)
                writes += 1
    assert 0.8 * PROGRESS_WRITES_PER_SECOND < writes / now <= PROGRESS_WRITES_PER_SECOND + 1


@pytest.mark.parametrize(
    ("changes", "matters"),
    [
        ({"done": 2, "loss": 1.0, "message": "warm"}, False),
        ({"phase": "Saving"}, True),
        ({"endpoint": "http://demo"}, True),
        ({"checkpoint": {"step": 1, "uri": "s3://b/1", "time": NOW}}, True),
        ({"attempt": 3}, True),
    ],
)
def test_which_reports_are_news(changes: Json, matters: bool) -> None:
    book, first = ProgressBook(), {"stage": "base", "attempt": 2, "phase": "Running", "done": 1, "time": NOW}
    assert book.put("uid", Progress.model_validate(first))
    assert book.put("uid", Progress.model_validate({**first, **changes})) is matters


def test_a_refused_run_keeps_what_was_known_of_it() -> None:
    complete = {"type": "Complete", "status": "False", "reason": "x", "lastTransitionTime": "2025-01-01T00:00:00Z"}
    raw = {"metadata": {"generation": 4}, "status": {"stage": "base", "summary": "Running", "conditions": [complete]}}
    status = refused_status(raw, ManifestError(["spec.seed: -1: too small"]), now=NOW)
    assert (status["summary"], status["stage"], status["observedGeneration"]) == ("Failed", "base", 4)
    assert complete in status["conditions"]
    (failed,) = [c for c in status["conditions"] if c["type"] == "Failed"]
    assert (failed["status"], failed["reason"], failed["message"]) == ("True", "Invalid", "spec.seed: -1: too small")
    again = refused_status(
        {**raw, "status": status}, ManifestError(["spec.seed: -1: too small"]), now=datetime.now(UTC)
    )
    assert again == status, "a refusal that is repeated changes nothing"


@pytest.mark.parametrize(
    ("generation", "complete", "kept"), [(4, "True", True), (5, "True", False), (4, "False", False)]
)
def test_a_complete_run_stays_so_until_its_spec_changes(generation: int, complete: str, kept: bool) -> None:
    status = {"observedGeneration": 4, "conditions": [{"type": "Complete", "status": complete}]}
    assert is_complete({"metadata": {"generation": generation}, "status": status}) is kept


def test_settings_have_defaults_and_say_what_is_wrong() -> None:
    settings = Settings.from_environment({"POD_NAME": "op-0", "POD_NAMESPACE": "system"})
    assert (settings.identity, settings.namespace, settings.port) == ("op-0", "system", 8080)
    with pytest.raises(ValueError, match="HEADRACE_WORKERS: 'many': set a whole number"):
        Settings.from_environment({"HEADRACE_WORKERS": "many"})
    with pytest.raises(ValueError, match="HEADRACE_LOG_FORMAT: 'xml': choose one of text, json"):
        Settings.from_environment({"HEADRACE_LOG_FORMAT": "xml"})
