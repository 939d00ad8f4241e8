"""Deployed models: one Deployment for all attempts of a stage, and a Service with a stable address."""

from typing import Any

from headrace_api.contract import ResolvedStage, service_name
from headrace_api.runtime import Pool
from headrace_api.stages import Deploy
from headrace_operator.body.build.names import (
    REPLICAS_ANNOTATION,
    RUN_LABEL,
    STAGE_LABEL,
    attempt_name,
    metadata,
    run_reference,
)
from headrace_operator.body.build.pod import CONTAINER, pod_template


def deployment(resolved: ResolvedStage, pool: Pool) -> dict[str, Any]:
    """A Deployment without spec.replicas: applying the field would own it. ``scale`` sets it instead."""
    deploy = _deploy(resolved)
    name = service_name(resolved.run, resolved.stage.name)
    config = attempt_name(resolved.run, resolved.stage.name, resolved.attempt)
    template = pod_template(resolved, pool, config=config, extra=_server(pool, port=deploy.port))
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {**metadata(resolved, name), "ownerReferences": [run_reference(resolved)]},
        "spec": {
            "selector": {"matchLabels": _selector(resolved)},
            "template": template,
        },
    }


def scale(resolved: ResolvedStage) -> dict[str, Any]:
    """A merge patch that sets the manifest's replicas."""
    replicas = _deploy(resolved).replicas
    return {
        "metadata": {"annotations": {REPLICAS_ANNOTATION: str(replicas)}},
        "spec": {"replicas": replicas},
    }


def cluster_service(resolved: ResolvedStage) -> dict[str, Any]:
    """The servers' address."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(resolved, service_name(resolved.run, resolved.stage.name)),
        "spec": {
            "type": "ClusterIP",
            "selector": _selector(resolved),
            "ports": [{"name": "http", "port": _deploy(resolved).port, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def _deploy(resolved: ResolvedStage) -> Deploy:
    config = resolved.stage.config
    assert isinstance(config, Deploy), f"{resolved.stage.kind} is not a service"
    return config


def _selector(resolved: ResolvedStage) -> dict[str, str]:
    """Leaves out the attempt: a selector is immutable, and a new attempt rolls over the old one."""
    return {RUN_LABEL: resolved.run, STAGE_LABEL: resolved.stage.name}


def _server(pool: Pool, *, port: int) -> dict[str, Any]:
    container = {
        "name": CONTAINER,
        "env": [{"name": "JOB_COMPLETION_INDEX", "value": "0"}],
        "ports": [{"name": "http", "containerPort": port, "protocol": "TCP"}],
        "readinessProbe": {
            "exec": {"command": [pool.python, "-m", "headrace_trainer.stages.deploy.ready"]},
            "periodSeconds": 10,
            "timeoutSeconds": 10,
            "failureThreshold": 3,
        },
    }
    return {"spec": {"restartPolicy": "Always", "containers": [container]}}
