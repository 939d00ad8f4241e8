"""What objects are called and labelled: the only place that knows, for building and for finding them again."""

from typing import Any

from headrace_api import API_VERSION, GROUP
from headrace_api.contract import ResolvedStage, service_name

RUN_LABEL = f"{GROUP}/run"
RUN_UID_LABEL = f"{GROUP}/run-uid"
STAGE_LABEL = f"{GROUP}/stage"
ATTEMPT_LABEL = f"{GROUP}/attempt"
HASH_ANNOTATION = f"{GROUP}/hash"
RESOLVED_ANNOTATION = f"{GROUP}/resolved"
"""ResolvedStage.digest of what the object was made for."""
DIGEST_ANNOTATION = f"{GROUP}/digest"
"""On Deployments, of what was asked for: the attempt and the runtime. Another one means that it has to be applied again;
the same one that it need not, even if a newer operator would build it otherwise."""
REPLICAS_ANNOTATION = f"{GROUP}/replicas"
"""On Deployments, how many replicas the manifest last asked for. Only a change of that is applied: between two of them
spec.replicas is an autoscaler's, or whoever's."""
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


def attempt_name(run: str, stage: str, attempt: int) -> str:
    """The Job of an attempt, and what belongs to it.

    Two hyphens join the parts, and no part has two in a row: a name can be taken apart in one way only.
    """
    return f"{service_name(run, stage)}--{attempt}"


def account_name(run: str) -> str:
    """The ServiceAccount of a run's pods; the operator's own cannot be called so."""
    return f"headrace--{run}"


def labels(resolved: ResolvedStage) -> dict[str, str]:
    """What every object of an attempt carries."""
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
    """Name, labels and digests of an object."""
    return {
        "name": name,
        "namespace": resolved.namespace,
        "labels": labels(resolved),
        "annotations": annotations(resolved),
    }


def annotations(resolved: ResolvedStage) -> dict[str, str]:
    """What an attempt was made for."""
    return {HASH_ANNOTATION: resolved.hash, RESOLVED_ANNOTATION: resolved.digest}


def run_reference(resolved: ResolvedStage) -> dict[str, Any]:
    """An ownerReference to the run."""
    return reference(API_VERSION, "TrainingRun", resolved.run, resolved.run_uid)


def reference(api_version: str, kind: str, name: str, uid: str) -> dict[str, Any]:
    """An ownerReference: the object goes when its owner goes."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "name": name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
