"""Build Kubernetes objects from a resolved stage and its runtime. Pure.

In: a ``ResolvedStage`` from ``plan`` and a ``TrainingRuntime``. Out: ``Objects`` for ``apply``.
"""

from dataclasses import dataclass

from headrace_api.artifact import canonical_digest
from headrace_api.contract import STAGE_FILE, ResolvedStage
from headrace_api.runtime import TrainingRuntime
from headrace_api.stages import RunsAs
from headrace_operator.body.build.job import headless_service, job
from headrace_operator.body.build.names import (
    DIGEST_ANNOTATION,
    RUN_LABEL,
    account_name,
    attempt_name,
    metadata,
    reference,
    run_reference,
)
from headrace_operator.body.build.service import cluster_service, deployment, scale
from headrace_operator.body.raw import Raw


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The objects of an attempt."""

    account: Raw
    """The ServiceAccount shared by the run's pods. Created first: no pod is admitted without it."""
    workload: Raw
    """The Job or Deployment."""
    config: Raw
    """The ConfigMap that holds stage.json."""
    service: Raw
    """The Service. Like the ConfigMap, it still lacks its ownerReference: ``owned`` adds it."""
    scale: Raw | None = None
    """A merge patch that sets a Deployment's replicas to the manifest's."""

    @property
    def dependents(self) -> tuple[Raw, Raw]:
        """Objects owned by the workload. The ConfigMap comes last: where it exists, or a pod runs, none is missing."""
        return self.service, self.config


def build(resolved: ResolvedStage, runtime: TrainingRuntime) -> Objects:
    """Build the objects of an attempt."""
    pool, account, config = runtime.spec.trainer, _account(resolved), _config(resolved)
    if resolved.stage.config.RUNS_AS is not RunsAs.SERVICE:
        workload, service = job(resolved, pool), headless_service(resolved)
        return Objects(account=account, workload=workload, config=config, service=service)
    workload, service = deployment(resolved, pool), cluster_service(resolved)
    asked = [resolved.digest, resolved.attempt, pool.model_dump(exclude_defaults=True)]
    workload["metadata"]["annotations"][DIGEST_ANNOTATION] = canonical_digest(asked)
    return Objects(account=account, workload=workload, config=config, service=service, scale=scale(resolved))


def owned(obj: Raw, *, by: Raw) -> Raw:
    """``obj`` with an ownerReference to ``by``, an object as the API server returned it."""
    meta = by["metadata"]
    owner = reference(by["apiVersion"], by["kind"], meta["name"], meta["uid"])
    return {**obj, "metadata": {**obj["metadata"], "ownerReferences": [owner]}}


def _account(resolved: ResolvedStage) -> Raw:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {
            "name": account_name(resolved.run),
            "namespace": resolved.namespace,
            "labels": {"app.kubernetes.io/managed-by": "headrace", RUN_LABEL: resolved.run},
            "ownerReferences": [run_reference(resolved)],
        },
        "automountServiceAccountToken": False,
    }


def _config(resolved: ResolvedStage) -> Raw:
    """The ConfigMap that holds stage.json. Immutable, one per attempt: a running attempt never changes, and an old
    server that restarts during a rollout still finds its own."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(resolved, attempt_name(resolved.run, resolved.stage.name, resolved.attempt)),
        "immutable": True,
        "data": {STAGE_FILE: resolved.model_dump_json(by_alias=True, exclude_none=True, indent=2)},
    }
