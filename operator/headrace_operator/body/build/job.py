"""Jobs for tasks and gangs, and the headless Service that gives their pods DNS names."""

from typing import Any

from headrace_api.contract import ResolvedStage
from headrace_api.runtime import Pool
from headrace_operator.body.build.names import attempt_name, labels, metadata, run_reference
from headrace_operator.body.build.pod import CONTAINER, MASTER_PORT, pod_template


def job(resolved: ResolvedStage, pool: Pool) -> dict[str, Any]:
    """An Indexed Job, one pod per node. The first failure ends the attempt: ``plan`` owns the retries."""
    name, nodes = attempt_name(resolved.run, resolved.stage.name, resolved.attempt), resolved.stage.compute.nodes
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {**metadata(resolved, name), "ownerReferences": [run_reference(resolved)]},
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": pod_template(resolved, pool, config=name, extra=_rendezvous(resolved, name)),
        },
    }


def _rendezvous(resolved: ResolvedStage, name: str) -> dict[str, Any]:
    """Rendezvous at pod 0, through its host name under the headless Service."""
    env = [
        {"name": "HEADRACE_MASTER_ADDR", "value": f"{name}-0.{name}.{resolved.namespace}.svc"},
        {"name": "HEADRACE_MASTER_PORT", "value": str(MASTER_PORT)},
    ]
    return {"spec": {"restartPolicy": "Never", "subdomain": name, "containers": [{"name": CONTAINER, "env": env}]}}


def headless_service(resolved: ResolvedStage) -> dict[str, Any]:
    """DNS names for the pods, published before they are ready: they need one another to get ready."""
    name = attempt_name(resolved.run, resolved.stage.name, resolved.attempt)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(resolved, name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels(resolved),
            "ports": [{"name": "rendezvous", "port": MASTER_PORT, "protocol": "TCP"}],
        },
    }
