"""Tasks and gangs: an Indexed Job, a headless Service that names its pods, a ConfigMap with stage.json."""

from typing import Any

from headrace_api.contract import ResolvedStage
from headrace_api.runtime import Pool
from headrace_operator.body.build.names import attempt_name, labels, metadata, run_reference
from headrace_operator.body.build.pod import CONTAINER, MASTER_PORT, pod_template


def job(resolved: ResolvedStage, pool: Pool) -> dict[str, Any]:
    """An Indexed Job: a pod for each node; the first failure ends the attempt, since ``plan`` owns the retries."""
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
    """How ranks find one another: pod 0 by its host name below the headless Service."""
    env = [
        {"name": "HEADRACE_MASTER_ADDR", "value": f"{name}-0.{name}.{resolved.namespace}.svc"},
        {"name": "HEADRACE_MASTER_PORT", "value": str(MASTER_PORT)},
    ]
    return {"spec": {"restartPolicy": "Never", "subdomain": name, "containers": [{"name": CONTAINER, "env": env}]}}


def headless_service(resolved: ResolvedStage) -> dict[str, Any]:
    """Names for the pods; before they are ready, for they wait for one another to become so."""
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
