"""Names, labels and annotations of objects: the one place for building them and finding them again."""

from typing import Any

from headrace_api import API_VERSION, GROUP
from headrace_api.contract import ResolvedStage, service_name

RUN_LABEL = f"{GROUP}/run"
RUN_UID_LABEL = f"{GROUP}/run-uid"
STAGE_LABEL = f"{GROUP}/stage"
ATTEMPT_LABEL = f"{GROUP}/attempt"
HASH_ANNOTATION = f"{GROUP}/hash"
RESOLVED_ANNOTATION = f"{GROUP}/resolved"
"""ResolvedStage.digest that the object was built for."""
DIGEST_ANNOTATION = f"{GROUP}/digest"
"""On Deployments: digest of the attempt and runtime it was built for. A new digest means apply again; the same digest
means leave it, even if a newer operator would build it differently."""
REPLICAS_ANNOTATION = f"{GROUP}/replicas"
"""On Deployments: the replicas that the manifest last asked for. Only a change of this number is applied; in between,
spec.replicas belongs to the autoscaler."""
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


def attempt_name(run: str, stage: str, attempt: int) -> str:
    """The name of an attempt's Job and of the objects it owns.

    Parts are joined by two hyphens and never contain two in a row, so no two attempts share a name.
    """
    return f"{service_name(run, stage)}--{attempt}"


def account_name(run: str) -> str:
    """The ServiceAccount of a run's pods. It cannot collide with the operator's own."""
    return f"headrace--{run}"


def labels(resolved: ResolvedStage) -> dict[str, str]:
    """The labels on every object of an attempt."""
    return {
        "app.kubernetes.io/name": "headrace",
        "app.kubernetes.io/component": resolved.stage.kind,
        "app.kubernetes.io/instance": resolved.run,
        "app.kubernetes.io/managed-by": "headrace",
        RUN_LABEL: resolved.run,
        RUN_UID_LABEL: resolved.run_uid,
        STAGE_LABEL: resolved.stage.name,
        ATTEMPT_LABEL: str(resolved.attempt),
    }


def metadata(resolved: ResolvedStage, name: str) -> dict[str, Any]:
    """Name, namespace, labels and annotations of an object."""
    return {
        "name": name,
        "namespace": resolved.namespace,
        "labels": labels(resolved),
        "annotations": annotations(resolved),
    }


def annotations(resolved: ResolvedStage) -> dict[str, str]:
    """What the attempt was built for."""
    return {HASH_ANNOTATION: resolved.hash, RESOLVED_ANNOTATION: resolved.digest}


def run_reference(resolved: ResolvedStage) -> dict[str, Any]:
    return reference(API_VERSION, "TrainingRun", resolved.run, resolved.run_uid)


def reference(api_version: str, kind: str, name: str, uid: str) -> dict[str, Any]:
    """An ownerReference: the object is garbage-collected with its owner."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "name": name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
