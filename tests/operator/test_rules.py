"""The small rules: who may claim a Lease, whose report is taken, when a status is written, what settings may be."""

from datetime import UTC, datetime
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from headrace_api.contract import Progress, ProgressReport
from headrace_api.errors import ManifestError
from headrace_operator.body.apply import status_delay
from headrace_operator.body.reconcile import is_complete, refused_status
from headrace_operator.body.records import PodRecord, pod_record
from headrace_operator.leader import may_claim
from headrace_operator.metrics import REGISTRY, RunCollector
from headrace_operator.progress import PodIdentity, Refusal, check, identity
from headrace_operator.settings import Settings

Json = dict[str, Any]

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("spec", "unchanged", "may"),
    [
        ({}, 0, True),
        ({"holderIdentity": ""}, 0, True),
        ({"holderIdentity": "me", "leaseDurationSeconds": 15}, 0, True),
        ({"holderIdentity": "other", "leaseDurationSeconds": 15}, 14, False),
        ({"holderIdentity": "other", "leaseDurationSeconds": 15}, 16, True),
    ],
)
def test_who_may_claim_a_lease(spec: Json, unchanged: float, may: bool) -> None:
    assert may_claim({"spec": spec}, "me", unchanged_seconds=unchanged) is may


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
    assert str(check(WHO, make_pod(), report())) == "team/demo"


@pytest.mark.parametrize(
    ("pod", "told", "said"),
    [
        (None, report(), "not one of a run"),
        (make_pod(uid="uid-1"), report(), "not one of a run"),
        (make_pod(owner="nobody"), report(), "not one of a run"),
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
    ("stored", "wanted", "since", "delay"),
    [
        ({"stage": "a", "step": "1"}, {"stage": "a", "step": "1"}, 0.0, None),
        ({}, {"stage": "a"}, 0.0, 0.0),
        ({"stage": "a"}, {"stage": "b", "step": "1"}, 0.0, 0.0),
        ({"step": "1"}, {"step": "2"}, 4.0, 6.0),
        ({"step": "1"}, {"step": "2"}, 11.0, 0.0),
        ({"step": "1", "loss": "2.0"}, {"step": "1"}, 4.0, 6.0),
        ({"metrics": {"loss": 2}}, {"metrics": {"loss": 2.0}}, 0.0, None),
    ],
)
def test_when_a_status_is_written(stored: Json, wanted: Json, since: float, delay: float | None) -> None:
    assert status_delay(stored, wanted, seconds_since_write=since) == delay


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


RUN: Json = {
    "metadata": {"namespace": "team", "name": "demo"},
    "spec": {"runtime": "h100"},
    "status": {
        "summary": "Running",
        "conditions": [{"type": "Complete", "status": "False"}],
        "stages": [
            {
                "name": "corpus",
                "state": "Succeeded",
                "attempt": 1,
                "startedAt": "2026-01-01T00:00:00Z",
                "finishedAt": "2026-01-01T00:01:30Z",
                "metrics": {"documents": 12},
            },
            {"name": "base", "state": "Running", "attempt": 3, "infraRestarts": 2},
        ],
    },
}
NEWEST = Progress(
    stage="base", attempt=3, done=40, total=100, loss=2.5, tokens_per_second=1e6, eta_seconds=30, time=NOW
)


def exposed() -> str:
    registry = CollectorRegistry()
    registry.register(RunCollector(lambda: [RUN], lambda _: [NEWEST]))
    return generate_latest(registry).decode()


@pytest.mark.parametrize(
    "line",
    [
        'headrace_run_info{namespace="team",run="demo",runtime="h100",summary="Running"} 1.0',
        'headrace_run_condition{namespace="team",run="demo",status="False",type="Complete"} 1.0',
        'headrace_run_restarts_total{namespace="team",reason="infra",run="demo",stage="base"} 2.0',
        'headrace_stage_state{namespace="team",run="demo",stage="corpus",state="Succeeded"} 1.0',
        'headrace_stage_duration_seconds{namespace="team",run="demo",stage="corpus"} 90.0',
        'headrace_stage_result{name="documents",namespace="team",run="demo",stage="corpus"} 12.0',
        'headrace_stage_done{namespace="team",run="demo",stage="base",unit="steps"} 40.0',
        'headrace_stage_planned{namespace="team",run="demo",stage="base",unit="steps"} 100.0',
        'headrace_stage_loss{namespace="team",run="demo",stage="base"} 2.5',
        'headrace_stage_remaining_seconds{namespace="team",run="demo",stage="base"} 30.0',
    ],
)
def test_figures_of_runs(line: str) -> None:
    assert line in exposed().splitlines()


def test_metrics_have_one_prefix_and_base_units() -> None:
    lines = (exposed() + generate_latest(REGISTRY).decode()).splitlines()
    types = dict(line.split(" ")[2:4] for line in lines if line.startswith("# TYPE headrace"))
    assert len(types) > 15
    for name, kind in types.items():
        assert name.startswith("headrace_")
        assert not name.endswith(("_ms", "_milliseconds", "_minutes", "_gib", "_mb", "_percent")), name
        assert (kind == "counter") == name.endswith("_total"), name
