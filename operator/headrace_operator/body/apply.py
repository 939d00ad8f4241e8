"""The only module that changes the cluster: attempts' objects, statuses, events.

In: the plan. Out: requests to the API server. Its answers go straight into the caches, so that the next decision
sees them even if a watch lags.
"""

import uuid
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Any

from headrace_api import API_VERSION
from headrace_api.contract import ResolvedStage
from headrace_api.runtime import TrainingRuntime
from headrace_api.stages import RunsAs
from headrace_operator.body.build import Objects, build, owned
from headrace_operator.body.build.names import DIGEST_ANNOTATION
from headrace_operator.body.caches import Cache, Cluster, R, RunKey
from headrace_operator.body.kube import FIELD_MANAGER, ApiError, Kube, path, path_of, version_of
from headrace_operator.body.outcomes import NameTaken
from headrace_operator.body.queue import Retry
from headrace_operator.body.raw import Raw
from headrace_operator.body.records import DeploymentRecord, Record, deployment_record, job_record
from headrace_operator.body.runs import Runs, key_of, uid_of
from headrace_operator.brain.plan import AttemptKey, Event
from headrace_operator.metrics import WRITES

_PROGRESS_FIELDS = frozenset({"step", "progress", "loss", "tokensPerSecond", "eta", "phaseMessage"})
_LONGEST_NOTE = 1024


class Writer:
    """Carries out plans."""

    def __init__(self, kube: Kube, *, cluster: Cluster, runs: Runs) -> None:
        self._kube, self._cluster, self._runs = kube, cluster, runs
        self._whole: dict[str, set[str]] = defaultdict(set)
        """uid of a run -> uids of its workloads whose objects are known to be complete."""

    def forget(self, run_uid: str) -> None:
        self._whole.pop(run_uid, None)

    async def start(self, resolved: ResolvedStage, runtime: TrainingRuntime) -> None:
        """Create an attempt's objects. Free once they exist.

        Raises:
            Retry: the name is taken by an object that is not this attempt's.
            ApiError: the API server refused.
        """
        if resolved.stage.config.RUNS_AS is RunsAs.SERVICE:
            await self._start_service(resolved, build(resolved, runtime))
        else:
            await self._start_job(resolved, runtime)

    async def _start_job(self, resolved: ResolvedStage, runtime: TrainingRuntime) -> None:
        known = self._known(self._cluster.jobs, resolved)
        if known is not None and known.deletion_deadline is None and await self._is_whole(known):
            return
        objects = build(resolved, runtime)
        if known is not None and known.name != objects.workload["metadata"]["name"]:
            self._whole[resolved.run_uid].add(known.uid)
            return
        await self._ensure(objects.account, owner=resolved.run_uid)
        created = await self._ensure(objects.workload, owner=resolved.run_uid)
        self._cluster.jobs.put(job_record(created))
        for dependent in objects.dependents:
            await self._ensure(
                _owned(dependent, by=objects.workload, as_stored=created), owner=created["metadata"]["uid"]
            )
        self._whole[resolved.run_uid].add(created["metadata"]["uid"])

    async def _start_service(self, resolved: ResolvedStage, objects: Objects) -> None:
        """Apply the Deployment if it is missing, or was built for another attempt or runtime; else leave it."""
        digest = objects.workload["metadata"]["annotations"][DIGEST_ANNOTATION]
        known = self._known(self._cluster.deployments, resolved)
        asked = known is not None and known.digest == digest and known.deletion_deadline is None
        if known is None or not asked or not await self._is_whole(known, service=objects.service):
            known = await self._apply_service(resolved, objects, as_asked=asked)
        if objects.scale is not None and known.asked != objects.scale["spec"]["replicas"]:
            await self._scale(known, objects.scale)

    async def _apply_service(self, resolved: ResolvedStage, objects: Objects, *, as_asked: bool) -> DeploymentRecord:
        """Create a service's objects: where possible, a new attempt's ConfigMap before the pods that mount it."""
        await self._ensure(objects.account, owner=resolved.run_uid)
        stored = await self._check_owner(objects.workload, owner=resolved.run_uid)
        if stored is not None:
            await self._ensure_config(objects, stored)
        if stored is None or not as_asked:
            stored = await self._apply(objects.workload)
            await self._ensure_config(objects, stored)
        uid, service = stored["metadata"]["uid"], _owned(objects.service, by=objects.workload, as_stored=stored)
        await self._ensure(service, owner=uid)
        await self._apply(service)
        record = deployment_record(stored)
        self._cluster.deployments.put(record)
        self._whole[resolved.run_uid].add(record.uid)
        return record

    async def _ensure_config(self, objects: Objects, stored: Raw) -> None:
        config = _owned(objects.config, by=objects.workload, as_stored=stored)
        await self._ensure(config, owner=stored["metadata"]["uid"])

    async def _scale(self, known: DeploymentRecord, scale: Raw) -> None:
        """Set the replicas. A merge patch: server-side apply would own the field, and later reset it."""
        WRITES.labels(verb="patch", kind="Deployment").inc()
        address = path("Deployment", namespace=known.namespace, name=known.name)
        query, merge = {"fieldManager": FIELD_MANAGER}, "application/merge-patch+json"
        answer = await self._kube.request("PATCH", address, body=scale, query=query, content_type=merge)
        self._cluster.deployments.put(deployment_record(answer))

    def _known(self, cache: Cache[R], resolved: ResolvedStage) -> R | None:
        """An attempt's workload, found by its labels: another operator version may have named it differently."""
        wanted = (resolved.stage.name, resolved.attempt, resolved.run_uid)
        of_run = cache.of_run(_key(resolved))
        return next((w for w in of_run if (w.stage, w.attempt, w.owner) == wanted), None)

    async def _is_whole(self, workload: Record, *, service: Raw | None = None) -> bool:
        """Whether all of an attempt's objects exist, even if another leader created them. At most one request.

        A Job's ConfigMap is created last, and no pod runs without it. A Deployment's Service is updated last.
        """
        known = self._whole[workload.run_uid]
        if workload.uid in known:
            return True
        if service is not None:
            made = await self._has(path_of(service), owner=workload.uid, labels=service["metadata"]["labels"])
        else:
            config = path("ConfigMap", namespace=workload.namespace, name=workload.name)
            made = self._has_run(workload) or await self._has(config, owner=workload.uid)
        if made:
            known.add(workload.uid)
        return made

    def _has_run(self, workload: Record) -> bool:
        pods = self._cluster.pods.of_run(RunKey(workload.namespace, workload.run))
        return any(pod.owner == workload.uid and pod.phase in ("Running", "Succeeded") for pod in pods)

    async def _has(self, address: str, *, owner: str, labels: Mapping[str, str] | None = None) -> bool:
        """Whether the object exists, with this owner and these labels."""
        try:
            meta = (await self._kube.get(address))["metadata"]
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        owners = [o["uid"] for o in meta.get("ownerReferences", [])]
        return owners == [owner] and (labels or {}).items() <= meta.get("labels", {}).items()

    async def _ensure(self, obj: Raw, *, owner: str) -> Raw:
        """Create an object. An existing one must have the same owner, and is left unchanged."""
        WRITES.labels(verb="create", kind=obj["kind"]).inc()
        collection = path(obj["kind"], namespace=obj["metadata"]["namespace"])
        try:
            return await self._kube.request("POST", collection, body=obj, query={"fieldManager": FIELD_MANAGER})
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        existing = await self._check_owner(obj, owner=owner)
        if existing is None:
            raise Retry(f"{obj['kind']} {obj['metadata']['name']} was deleted during the check")
        return existing

    async def _check_owner(self, obj: Raw, *, owner: str) -> Raw | None:
        """The object as stored, or None. Refuses one that has another owner or is being deleted."""
        try:
            existing = await self._kube.get(path_of(obj))
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        meta = existing["metadata"]
        what = f"{obj['kind']} {meta['namespace']}/{meta['name']}"
        if [o["uid"] for o in meta.get("ownerReferences", [])] != [owner]:
            raise NameTaken(f"{what} exists and is not this run's; delete it, or rename the run")
        if "deletionTimestamp" in meta:
            raise Retry(f"{what} is being deleted")
        return {"kind": obj["kind"], "apiVersion": obj["apiVersion"], **existing}

    async def _apply(self, obj: Raw) -> Raw:
        WRITES.labels(verb="apply", kind=obj["kind"]).inc()
        return await self._kube.apply(obj)

    async def stop(self, key: RunKey, attempt: AttemptKey, *, run_uid: str) -> None:
        """Delete an attempt's workload, and with it everything it owns. Its pods get SIGTERM, save and exit."""
        for kind, cache in (("Job", self._cluster.jobs), ("Deployment", self._cluster.deployments)):
            for known in cache.of_run(key):
                named = (known.stage, known.attempt) == (attempt.stage, attempt.number)
                ours = known.owner == run_uid and attempt.uid in ("", known.uid)
                if named and ours and known.deletion_deadline is None:
                    WRITES.labels(verb="delete", kind=kind).inc()
                    await self._kube.delete(path(kind, namespace=key.namespace, name=known.name), uid=known.uid)

    async def write_status(self, raw: Raw, status: dict[str, Any]) -> None:
        """Write a run's status, provided the run has not changed since it was read.

        Raises:
            Retry: the run changed, is gone, or was recreated; ``runs`` now holds what is there.
        """
        meta = {k: raw["metadata"][k] for k in ("name", "namespace", "uid", "resourceVersion")}
        body = {"apiVersion": API_VERSION, "kind": "TrainingRun", "metadata": meta, "status": status}
        WRITES.labels(verb="apply", kind="TrainingRun").inc()
        try:
            answer = await self._kube.apply(body, subresource="status")
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            await self._look_again(raw)
            raise Retry(f"the run changed during the reconcile: {error.message}") from error
        self._runs.put(answer)

    async def _look_again(self, raw: Raw) -> None:
        """Refresh a run in ``runs`` from the API server."""
        try:
            self._runs.put(await self._kube.get(path_of({"kind": "TrainingRun", **raw})))
        except ApiError as error:
            if error.status != 404:
                raise
            self._runs.drop(key_of(raw), uid=uid_of(raw), version=version_of(raw))

    async def post_event(self, raw: Raw, event: Event) -> None:
        """Post an Event about a run."""
        meta, now = raw["metadata"], datetime.now(UTC)
        about = {"apiVersion": API_VERSION, "kind": "TrainingRun"}
        about |= {k: meta[k] for k in ("name", "namespace", "uid", "resourceVersion")}
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{meta['name']}.{uuid.uuid4().hex[:16]}", "namespace": meta["namespace"]},
            "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": "headrace.dev/operator",
            "reportingInstance": "headrace-operator",
            "action": "Reconcile",
            "regarding": about,
            "type": event.type,
            "reason": event.reason,
            "note": event.message[:_LONGEST_NOTE],
        }
        WRITES.labels(verb="create", kind="Event").inc()
        await self._kube.request("POST", path("Event", namespace=meta["namespace"]), body=body)


class StatusChange(Enum):
    """How a wanted status differs from the stored one."""

    NONE = auto()
    PROGRESS = auto()
    """Only in progress columns."""
    STATE = auto()


def status_change(stored: dict[str, Any], wanted: dict[str, Any]) -> StatusChange:
    """Compare a wanted status with the stored one."""
    changed = {k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k)}
    if not changed:
        return StatusChange.NONE
    return StatusChange.STATE if changed - _PROGRESS_FIELDS else StatusChange.PROGRESS


def _owned(obj: Raw, *, by: Raw, as_stored: Raw) -> Raw:
    """``obj`` with an ownerReference to the stored workload. The API server's answers may lack kind and apiVersion."""
    return owned(obj, by={**as_stored, "kind": by["kind"], "apiVersion": by["apiVersion"]})


def _key(resolved: ResolvedStage) -> RunKey:
    return RunKey(resolved.namespace, resolved.run)
