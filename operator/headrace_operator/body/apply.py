"""The only place that changes the cluster: attempts' objects, statuses, events.

In: what ``plan`` decided. Out: requests to the API server; what it answers goes into the caches at once, so that the
next decision about the run sees it even if a watch lags.
"""

import uuid
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

from headrace_api import API_VERSION
from headrace_api.contract import ResolvedStage
from headrace_api.runtime import TrainingRuntime
from headrace_api.stages import RunsAs
from headrace_operator.body.build import Objects, build, owned
from headrace_operator.body.build.names import DIGEST_ANNOTATION
from headrace_operator.body.caches import Cluster, RunKey
from headrace_operator.body.kube import FIELD_MANAGER, ApiError, Kube, Raw, path, path_of
from headrace_operator.body.outcomes import NameTaken
from headrace_operator.body.queue import Retry
from headrace_operator.body.records import JobRecord, deployment_record, job_record
from headrace_operator.body.runs import Runs, key_of
from headrace_operator.brain.plan import AttemptKey, Event
from headrace_operator.metrics import WRITES

PROGRESS_SECONDS = 10.0
"""How often a status is written for nothing but progress."""
_PROGRESS_FIELDS = frozenset({"step", "progress", "loss", "tokensPerSecond", "eta", "phaseMessage"})
_LONGEST_NOTE = 1024


class Writer:
    """Carries out plans."""

    def __init__(self, kube: Kube, *, cluster: Cluster, runs: Runs) -> None:
        self._kube, self._cluster, self._runs = kube, cluster, runs
        self._whole: dict[RunKey, set[str]] = defaultdict(set)
        """uids of workloads of which this process knows that nothing of them is missing."""

    def forget(self, key: RunKey) -> None:
        """Forget a run."""
        self._whole.pop(key, None)

    async def start(self, resolved: ResolvedStage, runtime: TrainingRuntime) -> None:
        """Make an attempt's objects exist. Costs nothing once they do.

        Raises:
            Retry: an object of that name exists that is not this attempt's.
            ApiError: the API server refused.
        """
        if resolved.stage.config.RUNS_AS is RunsAs.SERVICE:
            await self._start_service(resolved, build(resolved, runtime))
        else:
            await self._start_job(resolved, runtime)

    async def _start_job(self, resolved: ResolvedStage, runtime: TrainingRuntime) -> None:
        known = self._known_job(resolved)
        if known is not None and known.deleted_at is None and known.uid in self._whole[_key(resolved)]:
            return
        objects = build(resolved, runtime)
        if known is not None and known.name != objects.workload["metadata"]["name"]:
            return
        await self._ensure(objects.account, owner=resolved.run_uid)
        created = await self._ensure(objects.workload, owner=resolved.run_uid)
        self._cluster.jobs.put(job_record(created))
        await self._complete(resolved, objects, created)

    def _known_job(self, resolved: ResolvedStage) -> JobRecord | None:
        """The Job of an attempt: by what it says of itself, since another version may have named it otherwise."""
        wanted = (resolved.stage.name, resolved.attempt, resolved.run_uid)
        of_run = self._cluster.jobs.of_run(_key(resolved))
        return next((j for j in of_run if (j.stage, j.attempt, j.owner) == wanted), None)

    async def _start_service(self, resolved: ResolvedStage, objects: Objects) -> None:
        """A Deployment is applied again when another one is wanted: another attempt, or a changed runtime."""
        wanted = objects.workload
        known = self._cluster.deployments.get(resolved.namespace, wanted["metadata"]["name"])
        same = known is not None and known.digest == wanted["metadata"]["annotations"][DIGEST_ANNOTATION]
        if known is not None and same and known.uid in self._whole[_key(resolved)] and known.deleted_at is None:
            return
        await self._ensure(objects.account, owner=resolved.run_uid)
        await self._check_owner(wanted, owner=resolved.run_uid)
        applied = await self._apply(wanted)
        self._cluster.deployments.put(deployment_record(applied))
        await self._complete(resolved, objects, applied)

    async def _complete(self, resolved: ResolvedStage, objects: Objects, workload: Raw) -> None:
        """Make what belongs to a workload exist. What exists is of the attempt as it was started, and is left alone."""
        uid = workload["metadata"]["uid"]
        for dependent in objects.dependents:
            wanted = owned(dependent, by={**workload, "apiVersion": objects.workload["apiVersion"]})
            await self._ensure(wanted, owner=uid)
        self._whole[_key(resolved)].add(uid)

    async def _ensure(self, obj: Raw, *, owner: str) -> Raw:
        """Create an object; one that exists must have the same owner, and is left as it is."""
        WRITES.labels(verb="create", kind=obj["kind"]).inc()
        collection = path(obj["kind"], namespace=obj["metadata"]["namespace"])
        try:
            return await self._kube.request("POST", collection, body=obj, query={"fieldManager": FIELD_MANAGER})
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        existing = await self._check_owner(obj, owner=owner)
        if existing is None:
            raise Retry(f"{obj['kind']} {obj['metadata']['name']} was deleted while it was looked at")
        return existing

    async def _check_owner(self, obj: Raw, *, owner: str) -> Raw | None:
        """The object as it exists, if it does; never somebody else's, nor one that is about to go."""
        try:
            existing = await self._kube.get(path_of(obj))
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        meta = existing["metadata"]
        what = f"{obj['kind']} {meta['namespace']}/{meta['name']}"
        if [o["uid"] for o in meta.get("ownerReferences", [])] != [owner]:
            raise NameTaken(f"{what} exists and is not this run's; delete it, or choose another name for the run")
        if "deletionTimestamp" in meta:
            raise Retry(f"{what} is being deleted")
        return {"kind": obj["kind"], "apiVersion": obj["apiVersion"], **existing}

    async def _apply(self, obj: Raw) -> Raw:
        WRITES.labels(verb="apply", kind=obj["kind"]).inc()
        return await self._kube.apply(obj)

    async def stop(self, key: RunKey, attempt: AttemptKey, *, run_uid: str) -> None:
        """Delete an attempt's workload: its pods are told to save and exit, and everything else of it goes too."""
        for kind, cache in (("Job", self._cluster.jobs), ("Deployment", self._cluster.deployments)):
            for known in cache.of_run(key):
                named = (known.stage, known.attempt) == (attempt.stage, attempt.number)
                ours = known.owner == run_uid and attempt.uid in ("", known.uid)
                if named and ours and known.deleted_at is None:
                    WRITES.labels(verb="delete", kind=kind).inc()
                    await self._kube.delete(path(kind, namespace=key.namespace, name=known.name), uid=known.uid)

    async def write_status(self, raw: Raw, status: dict[str, Any]) -> None:
        """Replace what the operator said of a run.

        Raises:
            Retry: the run is gone, or another one has its name now.
        """
        meta = {k: raw["metadata"][k] for k in ("name", "namespace", "uid")}
        body = {"apiVersion": API_VERSION, "kind": "TrainingRun", "metadata": meta, "status": status}
        WRITES.labels(verb="apply", kind="TrainingRun").inc()
        try:
            answer = await self._kube.apply(body, subresource="status")
        except ApiError as error:
            if error.status in (404, 409):
                raise Retry(f"the run changed while it was looked at: {error.message}") from error
            raise
        if self._runs.get(key_of(raw)) is not None:
            self._runs.put(answer)

    async def post_event(self, raw: Raw, event: Event) -> None:
        """Tell people about a transition."""
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


def status_delay(stored: dict[str, Any], wanted: dict[str, Any], *, seconds_since_write: float) -> float | None:
    """When a status is to be written: None for never, 0 for at once, more if only progress differs from a recent write."""
    changed = {k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k)}
    if not changed:
        return None
    if changed - _PROGRESS_FIELDS:
        return 0.0
    return max(0.0, PROGRESS_SECONDS - seconds_since_write)


def _key(resolved: ResolvedStage) -> RunKey:
    return RunKey(resolved.namespace, resolved.run)
