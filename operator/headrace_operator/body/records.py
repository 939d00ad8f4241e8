"""Kubernetes objects trimmed to the fields we read: a 10 KB pod becomes a 500-byte record. Pure.

In: JSON from the API server. Out: frozen records for ``caches``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from headrace_operator.body.build.names import (
    ATTEMPT_LABEL,
    DIGEST_ANNOTATION,
    HASH_ANNOTATION,
    INDEX_LABEL,
    REPLICAS_ANNOTATION,
    RESOLVED_ANNOTATION,
    RUN_LABEL,
    RUN_UID_LABEL,
    STAGE_LABEL,
)
from headrace_operator.body.build.pod import CONTAINER
from headrace_operator.body.raw import Raw
from headrace_operator.brain.observed import Held

_TEMPLATE_HASH_LABEL = "pod-template-hash"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What all children of a run have in common."""

    namespace: str
    name: str
    uid: str
    version: int
    """resourceVersion. Higher is newer."""
    run: str
    run_uid: str
    stage: str
    attempt: int
    hash: str
    resolved: str
    """ResolvedStage.digest it was built for; empty if another operator version built it."""
    owner: str
    """uid of its controller; empty if it has none, and for a pod that neither a Job nor a Deployment created."""
    deletion_deadline: datetime | None
    """When its deletion grace period ends; None unless it is being deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord(Record):
    """The Job of an attempt."""

    size: int
    """The number of pods it wants."""
    complete: bool
    failed: bool
    """Also true once it is about to fail and has begun to stop its other pods."""
    reason: str
    """Kubernetes' reason for the failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentRecord(Record):
    """The Deployment of a service."""

    digest: str
    """DIGEST_ANNOTATION of what was last applied."""
    asked: int
    """Replicas the manifest last asked for."""
    size: int
    """Replicas it has been set to, by whomever."""
    updated: int
    """Pods of the newest template."""
    old: int
    """Pods of older templates, which may still serve."""
    available_since: datetime | None
    """Since when enough replicas, old ones included, are available; None while they are not."""
    stuck: str
    """Kubernetes' message about a stalled rollout; empty otherwise."""
    refused: str
    """Why its pods cannot be created; empty otherwise."""
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PodRecord(Record):
    """A pod of an attempt."""

    index: int
    """JOB_COMPLETION_INDEX; 0 for a service's pods."""
    deployment: str
    """The Deployment whose ReplicaSet owns it; empty for a Job's pods."""
    phase: str
    node: str | None
    disruption: str
    """What disrupted it from outside, such as PreemptionByScheduler, Evicted or OOMKilled; empty if nothing did."""
    held: Held | None
    """Why it does not run yet, if Kubernetes says so."""
    exit_code: int | None
    """The trainer container's exit code; after a restart, that of the run before."""
    last_words: str
    """The termination message that came with the exit code."""
    finished_at: datetime | None
    restarts: int

    @property
    def ended(self) -> bool:
        """Whether all of its containers have ended for good."""
        return self.phase in ("Succeeded", "Failed")


def job_record(raw: Raw) -> JobRecord:
    conditions = _true_conditions(raw)
    failure = conditions.get("Failed") or conditions.get("FailureTarget")
    return JobRecord(
        **_common(raw),
        size=raw["spec"].get("completions", 1),
        complete="Complete" in conditions or "SuccessCriteriaMet" in conditions,
        failed=failure is not None,
        reason=(failure or {}).get("reason", ""),
    )


def deployment_record(raw: Raw) -> DeploymentRecord:
    """Trim a Deployment. A status that describes an older generation is ignored."""
    status, meta = raw.get("status", {}), raw["metadata"]
    current = status.get("observedGeneration") == meta.get("generation")
    conditions = {c["type"]: c for c in status.get("conditions", [])} if current else {}
    available, progressing = conditions.get("Available", {}), conditions.get("Progressing", {})
    failure = conditions.get("ReplicaFailure", {})
    updated = status.get("updatedReplicas", 0) if current else 0
    return DeploymentRecord(
        **_common(raw),
        digest=meta.get("annotations", {}).get(DIGEST_ANNOTATION, ""),
        asked=int(meta.get("annotations", {}).get(REPLICAS_ANNOTATION, 1)),
        size=raw["spec"].get("replicas", 1),
        updated=updated,
        old=status.get("replicas", 0) - updated,
        available_since=_time(available.get("lastTransitionTime")) if available.get("status") == "True" else None,
        stuck=str(progressing.get("message", "")) if progressing.get("reason") == "ProgressDeadlineExceeded" else "",
        refused=str(failure.get("message", "")) if failure.get("status") == "True" else "",
        port=_http_port(raw),
    )


def pod_record(raw: Raw) -> PodRecord:
    status = raw.get("status", {})
    container = _trainer(status.get("containerStatuses", []))
    state = container.get("state", {})
    ended = state.get("terminated") or container.get("lastState", {}).get("terminated") or {}
    deployment = _deployment_of(raw["metadata"])
    made = bool(deployment) or _controller(raw["metadata"]).get("kind") == "Job"
    return PodRecord(
        **{**_common(raw), **({} if made else {"owner": ""})},
        index=int(raw["metadata"]["labels"].get(INDEX_LABEL, 0)),
        deployment=deployment,
        phase=status.get("phase", "Pending"),
        node=raw["spec"].get("nodeName"),
        disruption=_disruption(raw, ended),
        held=_held(raw, state.get("waiting", {})),
        exit_code=ended.get("exitCode"),
        last_words=ended.get("message", ""),
        finished_at=_time(ended.get("finishedAt")),
        restarts=container.get("restartCount", 0),
    )


def _common(raw: Raw) -> dict[str, Any]:
    meta = raw["metadata"]
    labels = meta["labels"]
    return {
        "namespace": meta["namespace"],
        "name": meta["name"],
        "uid": meta["uid"],
        "version": int(meta["resourceVersion"]),
        "run": labels[RUN_LABEL],
        "run_uid": labels.get(RUN_UID_LABEL, ""),
        "stage": labels[STAGE_LABEL],
        "attempt": int(labels[ATTEMPT_LABEL]),
        "hash": meta.get("annotations", {}).get(HASH_ANNOTATION, ""),
        "resolved": meta.get("annotations", {}).get(RESOLVED_ANNOTATION, ""),
        "owner": _controller(meta).get("uid", ""),
        "deletion_deadline": _time(meta.get("deletionTimestamp")),
    }


def _controller(meta: Raw) -> Raw:
    return next((o for o in meta.get("ownerReferences", []) if o.get("controller")), {})


def _deployment_of(meta: Raw) -> str:
    """The Deployment's name, from its ReplicaSet's: the name, a hyphen and the pod-template-hash."""
    owner, tail = _controller(meta), f"-{meta['labels'].get(_TEMPLATE_HASH_LABEL)}"
    named = owner.get("kind") == "ReplicaSet" and owner["name"].endswith(tail)
    return str(owner["name"].removesuffix(tail)) if named else ""


def _true_conditions(raw: Raw) -> dict[str, Raw]:
    return {c["type"]: c for c in raw.get("status", {}).get("conditions", []) if c["status"] == "True"}


def _trainer(containers: Iterable[Raw]) -> Raw:
    return next((c for c in containers if c["name"] == CONTAINER), {})


def _http_port(raw: Raw) -> int:
    ports = _trainer(raw["spec"]["template"]["spec"]["containers"]).get("ports", [])
    return next((int(p["containerPort"]) for p in ports if p.get("name") == "http"), 0)


def _disruption(raw: Raw, ended: Raw) -> str:
    """What disrupted the pod. Plain exits, and deletion by its own Job, are not disruptions."""
    target = _true_conditions(raw).get("DisruptionTarget", {}).get("reason")
    said = raw.get("status", {}).get("reason") or ended.get("reason", "")
    return str(target or ("" if said in ("Completed", "Error") else said))


def _held(raw: Raw, waiting: Raw) -> Held | None:
    status = raw.get("status", {})
    if status.get("phase") != "Pending" and not waiting:
        return None
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason not in ("", "ContainerCreating", "PodInitializing"):
        # A container that has run can run again: its restart back-off does not keep it from starting.
        since = None if reason == "CrashLoopBackOff" else _time(status.get("startTime"))
        return Held(reason=reason, message=message, since=since)
    scheduled: Raw = next((c for c in status.get("conditions", []) if c["type"] == "PodScheduled"), {})
    if scheduled.get("status") != "False":
        return None
    return Held(reason=scheduled.get("reason", "Unscheduled"), message=scheduled.get("message", ""))


def _time(value: str | None) -> datetime | None:
    return datetime.fromisoformat(value) if value else None
