"""The pod of an attempt: our defaults, overlaid by the runtime's template, overlaid by what the contract requires."""

from decimal import Decimal
from typing import Any

from headrace_api.contract import STAGE_FILE, TOKEN_AUDIENCE, ResolvedStage
from headrace_api.runtime import Pool
from headrace_operator.body.build.merge import merge
from headrace_operator.body.build.names import account_name, annotations, labels

CONTAINER = "trainer"
MASTER_PORT = 29400
METRICS_PORT = 9400
_USER = 65532
_STOP_SECONDS = 120
_UNREACHABLE_SECONDS = 30
"""How long a pod stays on an unreachable node. Kubernetes' default, five minutes, would leave the gang's GPUs idle."""
_CONFIG_FOLDER = "/etc/headrace"
_TOKEN_FOLDER = "/var/run/secrets/headrace"
_TOKEN_SECONDS = 3600
_CACHE_FOLDER = "/var/cache/headrace"


def pod_template(resolved: ResolvedStage, pool: Pool, *, config: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Build a pod template.

    Args:
        resolved: the attempt.
        pool: the runtime's image and pod template.
        config: the name of the ConfigMap that holds stage.json.
        extra: what Jobs or Deployments add to the contract.
    """
    with_template = merge(_defaults(resolved, pool), pool.pod_template)
    return merge(with_template, merge(_contract(resolved, pool, config=config), extra))


def _defaults(resolved: ResolvedStage, pool: Pool) -> dict[str, Any]:
    """What a runtime may override: hardening, and the resources that the stage asks for."""
    container = {
        "name": CONTAINER,
        "image": pool.image,
        "imagePullPolicy": pool.image_pull_policy,
        "resources": _resources(resolved),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "env": [{"name": "HOME", "value": "/tmp"}, *_threads(resolved)],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    spec = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": _STOP_SECONDS,
        "tolerations": [_tolerate(taint) for taint in ("not-ready", "unreachable")],
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    scrape = {"prometheus.io/scrape": "true", "prometheus.io/port": str(METRICS_PORT)}
    return {"metadata": {"annotations": scrape}, "spec": spec | _spread(resolved)}


def _contract(resolved: ResolvedStage, pool: Pool, *, config: str) -> dict[str, Any]:
    """What the agent and the operator rely on; no runtime may override it."""
    secret = resolved.storage.secret_ref
    container: dict[str, Any] = {
        "name": CONTAINER,
        "command": [pool.python, "-m", "headrace_trainer.agent", f"{_CONFIG_FOLDER}/{STAGE_FILE}"],
        "terminationMessagePolicy": "File",
        "env": [
            {"name": "HEADRACE_NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "HEADRACE_PROGRESS_TOKEN_FILE", "value": f"{_TOKEN_FOLDER}/token"},
            {"name": "HEADRACE_METRICS_PORT", "value": str(METRICS_PORT)},
            {"name": "HEADRACE_SCRATCH", "value": "/tmp/headrace"},
        ],
        "envFrom": [{"secretRef": {"name": secret.name}}] if secret is not None else [],
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"}],
        "volumeMounts": [
            {"name": "headrace-stage", "mountPath": _CONFIG_FOLDER, "readOnly": True},
            {"name": "headrace-token", "mountPath": _TOKEN_FOLDER, "readOnly": True},
        ],
    }
    token = {"audience": TOKEN_AUDIENCE, "expirationSeconds": _TOKEN_SECONDS, "path": "token"}
    spec: dict[str, Any] = {
        "serviceAccountName": account_name(resolved.run),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [container],
        "volumes": [
            {"name": "headrace-stage", "configMap": {"name": config}},
            {"name": "headrace-token", "projected": {"sources": [{"serviceAccountToken": token}]}},
        ],
    }
    if pool.cache:
        container["env"].append({"name": "HEADRACE_CACHE", "value": _CACHE_FOLDER})
        container["volumeMounts"].append({"name": "headrace-cache", "mountPath": _CACHE_FOLDER})
        spec["volumes"].append({"name": "headrace-cache", **pool.cache})
    metadata = {"labels": labels(resolved), "annotations": annotations(resolved)}
    return {"metadata": metadata, "spec": spec}


def _resources(resolved: ResolvedStage) -> dict[str, Any]:
    compute = resolved.stage.compute
    requests, limits = {}, {}
    if compute.cpu is not None:
        requests["cpu"] = compute.cpu
    if compute.memory is not None:
        requests["memory"] = limits["memory"] = str(compute.memory)
    if compute.gpus_per_node:
        limits["nvidia.com/gpu"] = str(compute.gpus_per_node)
    return {k: v for k, v in (("requests", requests), ("limits", limits)) if v}


def _threads(resolved: ResolvedStage) -> list[dict[str, Any]]:
    """OMP threads per rank, from the CPU request. Without a request, the agent decides by the cores it finds."""
    cpu = resolved.stage.compute.cpu
    if cpu is None:
        return []
    cores = Decimal(cpu[:-1]) / 1000 if cpu.endswith("m") else Decimal(cpu)
    return [{"name": "OMP_NUM_THREADS", "value": str(max(1, int(cores / resolved.stage.compute.ranks)))}]


def _tolerate(taint: str) -> dict[str, Any]:
    return {
        "key": f"node.kubernetes.io/{taint}",
        "operator": "Exists",
        "effect": "NoExecute",
        "tolerationSeconds": _UNREACHABLE_SECONDS,
    }


def _spread(resolved: ResolvedStage) -> dict[str, Any]:
    """Prefer a separate node for each pod of an attempt."""
    if resolved.stage.compute.nodes == 1:
        return {}
    term = {"labelSelector": {"matchLabels": labels(resolved)}, "topologyKey": "kubernetes.io/hostname"}
    preferred = [{"weight": 100, "podAffinityTerm": term}]
    return {"affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}}
