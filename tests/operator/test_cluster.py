"""From cluster objects to attempts, outcomes and accepted reports."""

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from headrace_api.contract import Progress
from headrace_api.faults import FaultClass, Outcome
from headrace_operator.body.caches import Cache, Cluster, RefusalBook, RunKey
from headrace_operator.body.kube import ApiError
from headrace_operator.body.outcomes import NameTaken, ends_of, refusal_of
from headrace_operator.body.queue import Retry
from headrace_operator.body.records import JobRecord, PodRecord, deployment_record, job_record, pod_record
from headrace_operator.brain.endings import explain_failure, explain_success
from headrace_operator.brain.observed import Attempt, AttemptState, Held, Refusal

Json = dict[str, Any]

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
KEY = RunKey("team", "demo")
LABELS = {
    "headrace.dev/run": "demo",
    "headrace.dev/run-uid": "uid-1",
    "headrace.dev/stage": "base",
    "headrace.dev/attempt": "1",
}


def ago(seconds: float) -> str:
    return (NOW - timedelta(seconds=seconds)).isoformat()


def metadata(
    name: str,
    *,
    uid: str | None = None,
    version: int = 1,
    deleted: str | None = None,
    run_uid: str = "uid-1",
    owner: Json | None,
) -> Json:
    fields = {"namespace": "team", "name": name, "uid": uid or f"uid-of-{name}", "resourceVersion": str(version)}
    labels = {**LABELS, "headrace.dev/run-uid": run_uid}
    gone = {"deletionTimestamp": deleted} if deleted else {}
    owners = {"ownerReferences": [{**owner, "controller": True}]} if owner else {}
    return {**fields, **gone, **owners, "labels": labels, "annotations": {"headrace.dev/hash": "beef"}}


RUN = {"kind": "TrainingRun", "name": "demo", "uid": "uid-1"}
JOB = {"kind": "Job", "name": "demo--base--1", "uid": "uid-of-demo--base--1"}
REPLICA_SET = {"kind": "ReplicaSet", "name": "demo--base-5f9", "uid": "uid-of-demo--base-5f9"}


def make_job(
    *, size: int = 2, condition: str | None = None, deleted: str | None = None, version: int = 1, **meta: Any
) -> JobRecord:
    conditions = [{"type": condition, "status": "True", "reason": "BackoffLimitExceeded"}] if condition else []
    named = metadata("demo--base--1", deleted=deleted, version=version, **{"owner": RUN, **meta})
    return job_record({"metadata": named, "spec": {"completions": size}, "status": {"conditions": conditions}})


def make_pod(
    index: int = 0,
    *,
    phase: str = "Running",
    exit_code: int | None = None,
    words: Any = None,
    ended: str | None = None,
    deleted: str | None = None,
    reason: str = "",
    disruption: str = "",
    waiting: Json | None = None,
    unscheduled: str = "",
    restarts: int = 0,
    run_uid: str = "uid-1",
    owner: Json | None = JOB,
    template_hash: str = "5f9",
) -> PodRecord:
    state: Json = {"waiting": waiting} if waiting else {}
    if exit_code is not None:
        said = words if isinstance(words, str) else json.dumps(words) if words else ""
        state = {
            "terminated": {"exitCode": exit_code, "message": said, "finishedAt": ended or ago(0), "reason": reason}
        }
    meta = metadata(f"pod-{index}", deleted=deleted, run_uid=run_uid, owner=owner)
    made = {"batch.kubernetes.io/job-completion-index": str(index), "pod-template-hash": template_hash}
    meta["labels"] = {**meta["labels"], **made}
    conditions = [{"type": "DisruptionTarget", "status": "True", "reason": disruption}] if disruption else []
    container = {"name": "trainer", "state": state, "restartCount": restarts}
    if unscheduled:
        why = {"reason": "Unschedulable", "message": unscheduled}
        conditions.append({"type": "PodScheduled", "status": "False", **why})
    status = {"phase": phase, "containerStatuses": [container], "conditions": conditions, "startTime": ago(90)}
    return pod_record({"metadata": meta, "spec": {"nodeName": f"node-{index}"}, "status": status})


def failed(index: int = 0, *, exit_code: int = 70, **fields: Any) -> PodRecord:
    return make_pod(index, phase="Failed", exit_code=exit_code, **fields)


def copy_of(pod: PodRecord) -> PodRecord:
    """As ``kubectl debug --copy-to --keep-labels`` makes it."""
    return dataclasses.replace(pod, name=f"{pod.name}-debug", uid="copy", owner="")


def pending(reason: str, message: str = "", *, index: int = 0) -> PodRecord:
    return make_pod(index, phase="Pending", waiting={"reason": reason, "message": message})


def observe(*records: Any, report: Progress | None = None) -> tuple[Attempt, ...]:
    cluster = Cluster()
    for record in records:
        cache: Cache[Any] = {"JobRecord": cluster.jobs, "PodRecord": cluster.pods}.get(
            type(record).__name__, cluster.deployments
        )
        cache.put(record)
    if report is not None:
        cluster.progress.put("uid-1", report)
    return cluster.observe(KEY, run_uid="uid-1", now=NOW).attempts


STATES: list[tuple[str, list[Any], AttemptState | None]] = [
    ("nothing exists", [], None),
    ("a Job without pods", [make_job()], AttemptState.PENDING),
    ("one of two pods runs", [make_job(), make_pod(0), make_pod(1, phase="Pending")], AttemptState.PENDING),
    ("both run", [make_job(), make_pod(0), make_pod(1)], AttemptState.RUNNING),
    (
        "one has finished, one runs",
        [make_job(), make_pod(0, phase="Succeeded", exit_code=0), make_pod(1)],
        AttemptState.RUNNING,
    ),
    ("one failed, the Job has not noticed", [make_job(), failed(0), make_pod(1)], AttemptState.STOPPING),
    ("the Job ends the others", [make_job(condition="FailureTarget"), failed(0), make_pod(1)], AttemptState.STOPPING),
    ("all failed", [make_job(condition="Failed"), failed(0), failed(1)], AttemptState.FAILED),
    ("all failed, the Job has not noticed", [make_job(), failed(0), failed(1)], AttemptState.FAILED),
    ("failed, and no pod is left", [make_job(condition="Failed")], AttemptState.FAILED),
    (
        "complete",
        [make_job(condition="Complete", size=1), make_pod(phase="Succeeded", exit_code=0)],
        AttemptState.SUCCEEDED,
    ),
    ("complete, and no pod is left", [make_job(condition="Complete")], AttemptState.SUCCEEDED),
    ("a pod is being deleted", [make_job(), make_pod(0, deleted=ago(-60)), make_pod(1)], AttemptState.STOPPING),
    ("the Job was deleted, a pod saves", [make_pod(0, deleted=ago(-60))], AttemptState.STOPPING),
    ("the Job is being deleted", [make_job(deleted=ago(0))], AttemptState.STOPPING),
    ("the Job was deleted, the pods have ended", [failed(0, exit_code=75)], AttemptState.FAILED),
    ("a deleted pod is late", [make_job(), make_pod(0, deleted=ago(29)), failed(1)], AttemptState.STOPPING),
    ("a deleted pod's node is silent", [make_job(), make_pod(0, deleted=ago(31)), failed(1)], AttemptState.FAILED),
    ("all pods are on silent nodes", [make_job(size=1), make_pod(0, deleted=ago(31))], AttemptState.FAILED),
    ("only the remains of a lost pod", [make_pod(0, deleted=ago(31))], None),
    ("another run of the same name", [make_pod(0, run_uid="uid-0")], None),
    ("a copy of a failed pod that runs", [make_job(size=1), make_pod(0), copy_of(failed(1))], AttemptState.RUNNING),
    (
        "a copy that succeeded while the gang goes on",
        [make_job(size=1), make_pod(0), copy_of(make_pod(1, phase="Succeeded", exit_code=0))],
        AttemptState.RUNNING,
    ),
    ("nothing but a copy", [copy_of(failed(0))], None),
    (
        "a copy that another controller made",
        [make_job(size=1), make_pod(0), failed(1, owner={"kind": "StatefulSet", "name": "s", "uid": "u"})],
        AttemptState.RUNNING,
    ),
    (
        "two pods for one index",
        [make_job(size=2), make_pod(0), dataclasses.replace(make_pod(0), name="pod-0-again", uid="u")],
        AttemptState.PENDING,
    ),
    ("a Job that something else owns, and its pods", [make_job(owner={**RUN, "uid": "x"}), failed(0)], None),
]


@pytest.mark.parametrize(("records", "state"), [s[1:] for s in STATES], ids=[s[0] for s in STATES])
def test_where_an_attempt_is(records: list[Any], state: AttemptState | None) -> None:
    attempts = observe(*records)
    assert [a.state for a in attempts] == ([state] if state else [])
    assert all((a.stage, a.number, a.hash) == ("base", 1, "beef") for a in attempts)


def test_a_job_that_was_made_again_is_another_attempt_and_takes_no_blame_for_the_first_ones_pods() -> None:
    again = make_job(size=1, uid="again")
    first, second = observe(again, failed(0, exit_code=75))
    assert {(a.uid, a.state) for a in (first, second)} == {
        ("again", AttemptState.PENDING),
        ("uid-of-demo--base--1", AttemptState.FAILED),
    }


def test_a_servers_pods_are_known_by_the_deployment_that_made_their_replica_set() -> None:
    crashing = {"exit_code": 2, "words": say("user", "BadModel"), "restarts": 3}
    (ours,) = observe(make_deployment(), server(**crashing))
    assert ours.state is AttemptState.FAILED
    for stranger in (
        {"owner": None},
        {"owner": {**REPLICA_SET, "name": "copy-5f9"}, "template_hash": "5f8"},
        {"owner": {**REPLICA_SET, "kind": "DaemonSet"}},
    ):
        (attempt,) = observe(make_deployment(), server(**crashing, **stranger))
        assert attempt.state is AttemptState.PENDING, stranger


def say(fault: str | None, reason: str = "Said", **fields: Any) -> Json:
    return {"fault": fault, "reason": reason, **fields}


FAILURES: list[tuple[str, list[PodRecord], FaultClass | None, str]] = [
    ("what the pod said", [failed(words=say("process", "NcclError"))], FaultClass.PROCESS, "NcclError"),
    ("its exit code, if it said nothing", [failed(exit_code=2)], FaultClass.USER, "ExitCode"),
    ("its exit code, if it said nonsense", [failed(exit_code=74, words="oops")], FaultClass.STORAGE, "ExitCode"),
    ("what Kubernetes says", [failed(exit_code=137, reason="OOMKilled")], FaultClass.POD, "OOMKilled"),
    (
        "bad data before all else",
        [failed(0, words=say("process"), ended=ago(9)), failed(1, words=say("user", "BadRecord"), ended=ago(1))],
        FaultClass.USER,
        "BadRecord",
    ),
    (
        "storage before what followed from it",
        [failed(0, words=say("process"), ended=ago(9)), failed(1, words=say("storage", "SlowDown"), ended=ago(1))],
        FaultClass.STORAGE,
        "SlowDown",
    ),
    (
        "an evicted pod before the peers that missed it",
        [
            failed(0, words=say("process", "PeerLost"), ended=ago(9)),
            failed(1, exit_code=137, disruption="EvictionByEvictionAPI", ended=ago(1)),
        ],
        FaultClass.POD,
        "EvictionByEvictionAPI",
    ),
    (
        "a rank that hangs before the peers that waited for it",
        [
            failed(0, words=say("process", "PeerLost"), ended=ago(9)),
            failed(1, words=say("stall", "Stalled"), ended=ago(1)),
        ],
        FaultClass.STALL,
        "Stalled",
    ),
    (
        "the first of equals",
        [failed(0, words=say("process", "Late"), ended=ago(1)), failed(1, words=say("process", "First"), ended=ago(9))],
        FaultClass.PROCESS,
        "First",
    ),
    (
        "the lowest of those that failed at once",
        [failed(n, words=say("process", f"Pod{n}"), ended=ago(1)) for n in (2, 0, 1)],
        FaultClass.PROCESS,
        "Pod0",
    ),
    (
        "the failure, not the pods that the Job then stopped",
        [failed(0, exit_code=75, ended=ago(1)), failed(1, words=say("process", "RankKilled"), ended=ago(9))],
        FaultClass.PROCESS,
        "RankKilled",
    ),
    ("a stop, if all were stopped", [failed(0, exit_code=75), failed(1, exit_code=75)], FaultClass.STOPPED, "ExitCode"),
    ("nothing, if nobody is left", [], None, ""),
    ("nothing of a pod that lives", [make_pod()], None, ""),
]


@pytest.mark.parametrize(("pods", "fault", "reason"), [f[1:] for f in FAILURES], ids=[f[0] for f in FAILURES])
def test_what_explains_a_failure(pods: list[PodRecord], fault: FaultClass | None, reason: str) -> None:
    outcome = explain_failure(ends_of(pods))
    assert (outcome.fault if outcome else None) == fault
    assert (outcome.reason if outcome else "") == reason


def test_an_outcome_names_the_node() -> None:
    outcome = explain_failure(ends_of([failed(3)]))
    assert outcome is not None and outcome.node == "node-3"
    said = explain_failure(ends_of([failed(3, words=say("pod", "BadDisk", node="node-7"))]))
    assert said is not None and said.node == "node-7", "the one that it names, where it names one"


def test_the_pod_that_wrote_the_artifact_speaks_for_success() -> None:
    quiet = make_pod(0, phase="Succeeded", exit_code=0)
    writer = make_pod(1, phase="Succeeded", exit_code=0, words={"artifactDigest": "ab", "metrics": {"loss": 2.5}})
    outcome = explain_success(ends_of([quiet, writer]))
    assert outcome is not None and (outcome.artifact_digest, outcome.metrics) == ("ab", {"loss": 2.5})
    assert explain_success([]) is None


def report(**fields: Any) -> Progress:
    return Progress(stage="base", attempt=1, done=7, time=NOW, **fields)


HOLDS: list[tuple[str, list[PodRecord], Held | None]] = [
    ("a container that is being made", [pending("ContainerCreating")], None),
    (
        "an image that is not there, since the node took the pod",
        [pending("ErrImagePull", "no such image")],
        Held(reason="ErrImagePull", message="no such image", since=NOW - timedelta(seconds=90)),
    ),
    (
        "no node, since nobody knows when",
        [make_pod(0, phase="Pending", unscheduled="0/4 nodes have room")],
        Held(reason="Unschedulable", message="0/4 nodes have room"),
    ),
    (
        "the pod that may never start, rather than the one that waits for a node",
        [make_pod(0, phase="Pending", unscheduled="no room"), pending("InvalidImageName", "nonsense", index=1)],
        Held(reason="InvalidImageName", message="nonsense", since=NOW - timedelta(seconds=90)),
    ),
    ("a pod that runs", [make_pod()], None),
]


@pytest.mark.parametrize(("pods", "held"), [h[1:] for h in HOLDS], ids=[h[0] for h in HOLDS])
def test_what_holds_a_pending_attempt_back(pods: list[PodRecord], held: Held | None) -> None:
    (attempt,) = observe(make_job(size=3), *pods, report=report())
    assert (attempt.held, attempt.progress) == (held, report())


REFUSALS: list[tuple[str, Any, FaultClass | None, str]] = [
    (
        "a quota",
        ApiError(403, "Forbidden", 'jobs.batch "x" is forbidden: exceeded quota: q'),
        FaultClass.CAPACITY,
        "QuotaExceeded",
    ),
    (
        "the operator's own permission",
        ApiError(403, "Forbidden", 'jobs.batch is forbidden: User "op" cannot create resource "jobs"'),
        FaultClass.CAPACITY,
        "OperatorForbidden",
    ),
    (
        "a webhook",
        ApiError(403, "", 'admission webhook "w" denied the request: no'),
        FaultClass.POD,
        "StartRefused",
    ),
    ("validation", ApiError(422, "Invalid", "spec.template: Invalid value"), FaultClass.POD, "StartRefused"),
    ("nonsense", ApiError(400, "BadRequest", "cannot be decoded"), FaultClass.POD, "StartRefused"),
    ("somebody else's object", NameTaken("Job a/b exists"), FaultClass.CAPACITY, "NameTaken"),
    ("an object that is about to go", Retry("Job a/b is being deleted"), None, ""),
    ("a server that is overloaded", ApiError(429, "TooManyRequests", ""), None, ""),
    ("a webhook that does not answer", ApiError(500, "InternalError", "failed calling webhook"), None, ""),
    ("a lost race", ApiError(409, "Conflict", ""), None, ""),
    ("an expired token", ApiError(401, "Unauthorized", ""), None, ""),
]


@pytest.mark.parametrize(("error", "fault", "reason"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_what_a_refused_start_means(error: Any, fault: FaultClass | None, reason: str) -> None:
    outcome = refusal_of(error)
    assert (outcome.fault if outcome else None) == fault
    assert (outcome.reason if outcome else "") == reason
    said = error.message if isinstance(error, ApiError) else str(error)
    assert outcome is None or said in outcome.message


def test_a_refusal_is_news_once_whatever_figures_its_words_carry() -> None:
    book = RefusalBook()

    def refuse(number: int, reason: str, message: str) -> bool:
        outcome = Outcome(fault=FaultClass.CAPACITY, reason=reason, message=message)
        return book.put("uid-1", Refusal(stage="base", number=number, outcome=outcome))

    assert refuse(1, "QuotaExceeded", "used: 7") and not refuse(1, "QuotaExceeded", "used: 8")
    assert refuse(1, "StartRefused", "") and refuse(2, "StartRefused", "")
    assert [(r.number, r.outcome.reason) for r in book.of_run("uid-1")] == [(2, "StartRefused")]
    book.forget("uid-1")
    assert book.of_run("uid-1") == ()


def server(**fields: Any) -> PodRecord:
    return make_pod(**{"owner": REPLICA_SET, **fields})


def make_deployment(
    *,
    available: bool = False,
    stuck: bool = False,
    refused: str = "",
    updated: int = 1,
    old: int = 0,
    size: int = 1,
    observed: int = 1,
    asked: int | None = None,
    **meta: Any,
) -> Any:
    conditions = [{"type": "Available", "status": str(available), "lastTransitionTime": ago(5)}]
    if stuck:
        said = {"reason": "ProgressDeadlineExceeded", "message": "timed out"}
        conditions.append({"type": "Progressing", "status": "False", **said})
    if refused:
        conditions.append({"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": refused})
    ports = [{"name": "http", "containerPort": 8000}]
    template = {"spec": {"containers": [{"name": "trainer", "ports": ports}]}}
    named = {**metadata("demo--base", owner=RUN, **meta), "generation": 1}
    if asked is not None:
        named["annotations"] = {**named["annotations"], "headrace.dev/replicas": str(asked)}
    counts = {"updatedReplicas": updated, "replicas": updated + old}
    status = {"observedGeneration": observed, "conditions": conditions, **counts}
    return deployment_record({"metadata": named, "spec": {"template": template, "replicas": size}, "status": status})


def test_a_service_has_an_endpoint_while_its_own_servers_answer() -> None:
    (up,) = observe(make_deployment(available=True), server())
    assert up.state is AttemptState.RUNNING and up.progress is not None
    assert up.progress.endpoint == "http://demo--base.team.svc:8000"


SILENT: list[tuple[str, Any]] = [
    ("no replica answers", make_deployment()),
    ("what answers is of an earlier attempt", make_deployment(available=True, updated=1, old=1)),
    ("nothing is of this attempt yet", make_deployment(available=True, updated=0, old=2)),
    ("the status is about an earlier spec", make_deployment(available=True, observed=0)),
    ("it was scaled to nothing before it ever answered", make_deployment(available=True, updated=0, size=0)),
]


@pytest.mark.parametrize("deployment", [s[1] for s in SILENT], ids=[s[0] for s in SILENT])
def test_a_service_has_no_endpoint_while(deployment: Any) -> None:
    (down,) = observe(deployment, server(), report=report(endpoint="http://stale"))
    assert down.state is AttemptState.PENDING
    assert down.progress is not None and down.progress.endpoint is None


def test_a_service_fails_when_its_server_never_can_start() -> None:
    crashing = {"exit_code": 2, "words": say("user", "BadModel"), "restarts": 3}
    (attempt,) = observe(make_deployment(), server(**crashing))
    assert attempt.state is AttemptState.FAILED and attempt.outcome is not None
    assert attempt.outcome.reason == "BadModel"
    (young,) = observe(make_deployment(), server(**{**crashing, "restarts": 1}))
    assert young.state is AttemptState.PENDING
    (late,) = observe(make_deployment(stuck=True), server(exit_code=70, restarts=1))
    assert late.state is AttemptState.FAILED and late.outcome is not None
    assert late.outcome.fault is FaultClass.PROCESS


SLOW: list[tuple[str, Any, list[PodRecord], str]] = [
    ("its model is large", make_deployment(stuck=True), [server()], "ProgressDeadlineExceeded: timed out"),
    (
        "no node has room",
        make_deployment(stuck=True),
        [server(phase="Pending", unscheduled="0/4 nodes have a GPU")],
        "Unschedulable: 0/4 nodes have a GPU",
    ),
    ("a quota is used up", make_deployment(refused="exceeded quota"), [], "FailedCreate: exceeded quota"),
]


@pytest.mark.parametrize(("deployment", "pods", "said"), [s[1:] for s in SLOW], ids=[s[0] for s in SLOW])
def test_a_slow_start_waits_and_says_why(deployment: Any, pods: list[PodRecord], said: str) -> None:
    (attempt,) = observe(deployment, *pods)
    assert attempt.state is AttemptState.PENDING and attempt.held is not None
    assert f"{attempt.held.reason}: {attempt.held.message}" == said
    assert attempt.held.since is None, "it takes any time"


def test_a_roll_over_says_who_answers_meanwhile() -> None:
    (attempt,) = observe(make_deployment(available=True, updated=1, old=2, size=2))
    assert attempt.missing == "1 of 2 servers created; 2 of an earlier attempt still running"


def test_pods_of_an_earlier_attempt_of_a_service_are_another_attempt() -> None:
    deployment = dataclasses.replace(make_deployment(available=True, updated=1, old=1), attempt=2)
    old, new = observe(deployment, server(), dataclasses.replace(server(index=1), attempt=2, name="new"))
    assert [(a.number, a.state) for a in (old, new)] == [(1, AttemptState.STOPPING), (2, AttemptState.PENDING)]


def test_a_run_is_looked_at_again_when_a_pod_is_to_be_given_up() -> None:
    cluster = Cluster()
    assert cluster.seconds_to_loss(KEY, now=NOW) is None
    cluster.pods.put(make_pod(deleted=ago(-60)))
    assert cluster.seconds_to_loss(KEY, now=NOW) == 90


def test_a_cache_keeps_the_newer_record_of_the_same_object() -> None:
    cache: Cache[JobRecord] = Cache()
    assert cache.put(make_job(version=5))
    assert not cache.put(make_job(version=4, condition="Failed"))
    assert [job.failed for job in cache.of_run(KEY)] == [False]
    assert cache.put(make_job(version=6, condition="Failed"))
    assert cache.keep_only(set(), version=6) == [KEY]
    assert len(cache) == 0 and cache.of_run(KEY) == ()
