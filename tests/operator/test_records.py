"""Pods, Jobs and Deployments as the API server sends them, and the records kept of them."""

import copy
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from headrace_operator.body.records import (
    DeploymentRecord,
    JobRecord,
    PodRecord,
    deployment_record,
    job_record,
    pod_record,
)
from headrace_operator.brain.observed import Held

Json = dict[str, Any]

GONE: Any = object()


def at(minute: int) -> datetime:
    return datetime(2026, 1, 1, 12, minute, tzinfo=UTC)


def metadata(name: str, *, kind: str, owner: str, **labels: str) -> Json:
    ours = {"run": "demo", "run-uid": "uid-of-demo", "stage": "base", "attempt": "2"}
    return {
        "namespace": "team",
        "name": name,
        "uid": f"uid-of-{name}",
        "resourceVersion": "71",
        "generation": 5,
        "labels": {**{f"headrace.dev/{k}": v for k, v in ours.items()}, **labels},
        "annotations": {"headrace.dev/hash": "beef", "headrace.dev/resolved": "cafe"},
        "ownerReferences": [
            {"kind": "ConfigMap", "name": "mentions-it-too", "uid": "uid-of-another"},
            {"kind": kind, "name": owner, "uid": f"uid-of-{owner}", "controller": True},
        ],
    }


COMMON: Json = {
    "namespace": "team",
    "version": 71,
    "run": "demo",
    "run_uid": "uid-of-demo",
    "stage": "base",
    "attempt": 2,
    "hash": "beef",
    "resolved": "cafe",
    "deletion_deadline": None,
}

POD: Json = {
    "metadata": metadata(
        "pod",
        kind="Job",
        owner="job",
        **{"batch.kubernetes.io/job-completion-index": "3", "pod-template-hash": "5f9"},
    ),
    "spec": {"nodeName": "node-7"},
    "status": {
        "phase": "Running",
        "startTime": "2026-01-01T12:01:00Z",
        "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "DisruptionTarget", "status": "False", "reason": "Not"}],
        "containerStatuses": [
            {"name": "sidecar", "restartCount": 9, "state": {"terminated": {"exitCode": 9, "message": "not ours"}}},
            {"name": "trainer", "restartCount": 1, "state": {"running": {"startedAt": "2026-01-01T12:02:00Z"}}},
        ],
    },
}  # fmt: skip
RUNNING = PodRecord(
    **{**COMMON, "name": "pod", "uid": "uid-of-pod", "owner": "uid-of-job"},
    index=3, deployment="", phase="Running", node="node-7", disruption="", held=None, exit_code=None, last_words="",
    finished_at=None, restarts=1,
)  # fmt: skip


def changed(raw: Json, changes: Json) -> Json:
    """``raw`` with some of its fields replaced, named by their paths."""
    raw = copy.deepcopy(raw)
    for path, value in changes.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split())
        node: Any = raw
        for part in parents:
            node = node[part]
        if value is GONE:
            del node[last]
        else:
            node[last] = value
    return raw


TRAINER = "status containerStatuses 1"
ENDED = {"exitCode": 70, "message": "words", "finishedAt": "2026-01-01T12:03:00Z", "reason": "Error"}
REPLICA_SET = {"kind": "ReplicaSet", "name": "demo--base-5f9", "uid": "uid-of-set", "controller": True}
PODS: list[tuple[str, Json, Json]] = [
    ("runs", {}, {}),
    ("is being deleted", {"metadata deletionTimestamp": "2026-01-01T12:09:00Z"}, {"deletion_deadline": at(9)}),
    (
        "has failed",
        {"status phase": "Failed", f"{TRAINER} state": {"terminated": ENDED}},
        {"phase": "Failed", "exit_code": 70, "last_words": "words", "finished_at": at(3)},
    ),
    (
        "was started again",
        {f"{TRAINER} lastState": {"terminated": ENDED}, f"{TRAINER} restartCount": 2},
        {"exit_code": 70, "last_words": "words", "finished_at": at(3), "restarts": 2},
    ),
    (
        "has failed again: the newest end counts",
        {
            f"{TRAINER} state": {"terminated": {"exitCode": 2, "reason": "Error"}},
            f"{TRAINER} lastState": {"terminated": ENDED},
        },
        {"exit_code": 2},
    ),
    (
        "ended for want of memory",
        {f"{TRAINER} state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}},
        {"exit_code": 137, "disruption": "OOMKilled"},
    ),
    (
        "has finished",
        {f"{TRAINER} state": {"terminated": {"exitCode": 0, "reason": "Completed"}}},
        {"exit_code": 0},
    ),
    ("was evicted by its node", {"status reason": "Evicted"}, {"disruption": "Evicted"}),
    (
        "was preempted, and its container killed",
        {
            "status conditions 1": {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"},
            "status reason": "Terminated",
        },
        {"disruption": "PreemptionByScheduler"},
    ),
    (
        "waits for its image",
        {"status phase": "Pending", f"{TRAINER} state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}},
        {"phase": "Pending", "held": Held(reason="ErrImagePull", message="no such image", since=at(1))},
    ),
    (
        "waits to be started again, having run",
        {f"{TRAINER} state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}},
        {"held": Held(reason="CrashLoopBackOff", message="back-off 10s")},
    ),
    (
        "is being made",
        {"status phase": "Pending", f"{TRAINER} state": {"waiting": {"reason": "ContainerCreating"}}},
        {"phase": "Pending"},
    ),
    (
        "has containers that are being made, after others",
        {"status phase": "Pending", f"{TRAINER} state": {"waiting": {"reason": "PodInitializing"}}},
        {"phase": "Pending"},
    ),
    (
        "waits for a node",
        {
            "status phase": "Pending",
            "status conditions": [
                {"type": "Ready", "status": "False", "reason": "NotReady"},
                {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no room"},
            ],
            f"{TRAINER} state": {},
        },
        {"phase": "Pending", "held": Held(reason="Unschedulable", message="no room")},
    ),
    (
        "waits for a node, and nobody says why",
        {"status phase": "Pending", "status conditions": [{"type": "PodScheduled", "status": "False"}]},
        {"phase": "Pending", "held": Held(reason="Unscheduled", message="")},
    ),
    (
        "waits for its image, and nobody says why",
        {"status phase": "Pending", f"{TRAINER} state": {"waiting": {"reason": "ErrImagePull"}}},
        {"phase": "Pending", "held": Held(reason="ErrImagePull", message="", since=at(1))},
    ),
    ("waits, and no scheduler has looked at it", {"status": {"phase": "Pending", "conditions": []}}, {"phase": "Pending", "restarts": 0}),
    ("waits, and nothing is known of it", {"status": {"phase": "Pending"}}, {"phase": "Pending", "restarts": 0}),
    (
        "has run, and is unscheduled by name only",
        {"status conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]},
        {},
    ),
    (
        "was made this moment",
        {"status": GONE, "spec nodeName": GONE},
        {"phase": "Pending", "node": None, "restarts": 0},
    ),
    (
        "is a server's",
        {"metadata ownerReferences 1": REPLICA_SET, "metadata labels batch.kubernetes.io/job-completion-index": GONE},
        {"deployment": "demo--base", "owner": "uid-of-set", "index": 0},
    ),
    (
        "is a server's, by a ReplicaSet that another template made",
        {"metadata ownerReferences 1": {**REPLICA_SET, "name": "demo--base-777"}},
        {"owner": ""},
    ),
    ("has the name of a server's, and not its kind", {"metadata ownerReferences 1 name": "demo--base-5f9", "metadata ownerReferences 1 kind": "StatefulSet"}, {"owner": ""}),
    ("belongs to nobody", {"metadata ownerReferences": GONE}, {"owner": ""}),
    (
        "was made by an older version",
        {"metadata annotations": GONE, "metadata labels headrace.dev/run-uid": GONE},
        {"hash": "", "resolved": "", "run_uid": ""},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kept"), [p[1:] for p in PODS], ids=[p[0] for p in PODS])
def test_what_is_kept_of_a_pod_that(changes: Json, kept: Json) -> None:
    assert pod_record(changed(POD, changes)) == replace(RUNNING, **kept)


@pytest.mark.parametrize(
    ("phase", "ended"), [("Pending", False), ("Running", False), ("Succeeded", True), ("Failed", True), ("Unknown", False)]
)  # fmt: skip
def test_a_pod_has_ended_once_none_of_its_containers_will_run_again(phase: str, ended: bool) -> None:
    assert replace(RUNNING, phase=phase).ended is ended


JOB: Json = {
    "metadata": metadata("job", kind="TrainingRun", owner="demo"),
    "spec": {"completions": 4},
    "status": {"conditions": [{"type": "Failed", "status": "False", "reason": "Not"}]},
}
AT_WORK = JobRecord(
    **{**COMMON, "name": "job", "uid": "uid-of-job", "owner": "uid-of-demo"},
    size=4, complete=False, failed=False, reason="",
)  # fmt: skip


def holds(kind: str, **said: str) -> Json:
    return {"status conditions": [{"type": kind, "status": "True", **said}]}


JOBS: list[tuple[str, Json, Json]] = [
    ("works", {}, {}),
    ("belongs to nobody", {"metadata ownerReferences": GONE}, {"owner": ""}),
    ("was made this moment", {"status": GONE, "spec completions": GONE}, {"size": 1}),
    ("is complete", holds("Complete"), {"complete": True}),
    ("has all that it wants, and still ends pods", holds("SuccessCriteriaMet"), {"complete": True}),
    ("has failed", holds("Failed", reason="DeadlineExceeded"), {"failed": True, "reason": "DeadlineExceeded"}),
    ("fails, and still ends pods", holds("FailureTarget", reason="PodFailed"), {"failed": True, "reason": "PodFailed"}),
    ("has failed, and nobody says why", holds("Failed"), {"failed": True}),
]


@pytest.mark.parametrize(("changes", "kept"), [j[1:] for j in JOBS], ids=[j[0] for j in JOBS])
def test_what_is_kept_of_a_job_that(changes: Json, kept: Json) -> None:
    assert job_record(changed(JOB, changes)) == replace(AT_WORK, **kept)


DEPLOYMENT: Json = {
    "metadata": metadata("serve", kind="TrainingRun", owner="demo"),
    "spec": {
        "replicas": 3,
        "template": {
            "spec": {
                "containers": [
                    {"name": "sidecar", "ports": [{"name": "http", "containerPort": 1}]},
                    {"name": "trainer", "ports": [{"name": "metrics", "containerPort": 2}, {"name": "http", "containerPort": 8000}]},
                ]
            }
        },
    },
    "status": {
        "observedGeneration": 5,
        "replicas": 4,
        "updatedReplicas": 3,
        "conditions": [
            {"type": "Available", "status": "True", "lastTransitionTime": "2026-01-01T12:05:00Z"},
            {"type": "Progressing", "status": "True", "reason": "ReplicaSetUpdated", "message": "goes on"},
            {"type": "ReplicaFailure", "status": "False", "message": "not now"},
        ],
    },
}  # fmt: skip
DEPLOYMENT["metadata"]["annotations"] |= {"headrace.dev/digest": "d1", "headrace.dev/replicas": "2"}
SERVING = DeploymentRecord(
    **{**COMMON, "name": "serve", "uid": "uid-of-serve", "owner": "uid-of-demo"},
    digest="d1", asked=2, size=3, updated=3, old=1, available_since=at(5), stuck="", refused="", port=8000,
)  # fmt: skip
DEPLOYMENTS: list[tuple[str, Json, Json]] = [
    ("serves", {}, {}),
    ("does not answer", {"status conditions 0 status": "False"}, {"available_since": None}),
    (
        "does not go on",
        {"status conditions 1": {"type": "Progressing", "reason": "ProgressDeadlineExceeded", "message": "too slow"}},
        {"stuck": "too slow"},
    ),
    (
        "does not go on, and nobody says why",
        {"status conditions 1": {"type": "Progressing", "reason": "ProgressDeadlineExceeded"}},
        {},
    ),
    ("may make no pods, and nobody says why", {"status conditions 2": {"type": "ReplicaFailure", "status": "True"}}, {}),
    (
        "has no pods of its own yet",
        {"status": {"observedGeneration": 5, "replicas": 1}},
        {"updated": 0, "old": 1, "available_since": None},
    ),
    ("may make no pods", {"status conditions 2 status": "True"}, {"refused": "not now"}),
    (
        "has seen an older spec only",
        {"status observedGeneration": 4},
        {"updated": 0, "old": 4, "available_since": None},
    ),
    (
        "was made this moment",
        {"status": GONE, "spec replicas": GONE, "metadata annotations": GONE},
        {"hash": "", "resolved": "", "digest": "", "asked": 1, "size": 1, "updated": 0, "old": 0, "available_since": None},
    ),
    ("has a server without a port", {"spec template spec containers 1": {"name": "trainer"}}, {"port": 0}),
    ("has no server", {"spec template spec containers": [{"name": "sidecar"}]}, {"port": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kept"), [d[1:] for d in DEPLOYMENTS], ids=[d[0] for d in DEPLOYMENTS])
def test_what_is_kept_of_a_deployment_that(changes: Json, kept: Json) -> None:
    assert deployment_record(changed(DEPLOYMENT, changes)) == replace(SERVING, **kept)
