"""Where changes come in. Nothing is decided here: a change updates a cache and puts the run's key in the queue.

TrainingRuns come through kopf, whose only handler is ``on.event``: no finalizers, no annotations, no timers. Their
children come through ``Reflector``: pages and watches with a label selector, kept as trimmed records.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import kopf

from headrace_api import GROUP, VERSION
from headrace_operator.body.build.names import RUN_LABEL
from headrace_operator.body.caches import Cache, Cluster, R, RunKey
from headrace_operator.body.kube import ApiError, Kube, Raw, path
from headrace_operator.body.records import deployment_record, job_record, pod_record
from headrace_operator.body.runs import Runs, key_of
from headrace_operator.metrics import WATCH_EVENTS, WATCH_FAILURES

logger = logging.getLogger(__name__)

_TROUBLES = (ApiError, aiohttp.ClientError, TimeoutError)
_LONGEST_PAUSE_SECONDS = 30.0

Notify = Callable[[RunKey], None]


class Sink(Protocol):
    """What a reflector fills."""

    def put(self, raw: Raw) -> None:
        """An object was added or changed."""

    def drop(self, raw: Raw) -> None:
        """An object was deleted."""

    def replace(self, raws: set[tuple[str, str]]) -> None:
        """These (namespace, name) are all objects that there are."""


@dataclass(frozen=True, kw_only=True)
class CacheSink:
    """Fills a cache with records and tells which runs they belong to."""

    cache: Cache[Any]
    record: Callable[[Raw], Any]
    notify: Notify

    def put(self, raw: Raw) -> None:
        """Remember an object's record; an object that only looks like one of ours is skipped."""
        try:
            record = self.record(raw)
        except (KeyError, ValueError) as error:
            logger.warning("%s %s is not Headrace's: %r", raw.get("kind"), raw["metadata"].get("name"), error)
            return
        if self.cache.put(record):
            self.notify(RunKey(record.namespace, record.run))

    def drop(self, raw: Raw) -> None:
        """Forget an object."""
        key = self.cache.drop(raw["metadata"]["namespace"], raw["metadata"]["name"])
        if key is not None:
            self.notify(key)

    def replace(self, raws: set[tuple[str, str]]) -> None:
        """Forget all others."""
        for key in self.cache.keep_only(raws):
            self.notify(key)


@dataclass(frozen=True, kw_only=True)
class RuntimeSink:
    """Keeps TrainingRuntimes; wakes the runs that name one that changed."""

    runtimes: dict[str, Raw]
    runs: Runs
    notify: Notify

    def put(self, raw: Raw) -> None:
        """Remember a runtime."""
        self.runtimes[raw["metadata"]["name"]] = raw
        self._wake(raw["metadata"]["name"])

    def drop(self, raw: Raw) -> None:
        """Forget a runtime."""
        self.runtimes.pop(raw["metadata"]["name"], None)
        self._wake(raw["metadata"]["name"])

    def replace(self, raws: set[tuple[str, str]]) -> None:
        """Forget all others."""
        for name in self.runtimes.keys() - {name for _, name in raws}:
            del self.runtimes[name]
            self._wake(name)

    def _wake(self, runtime: str) -> None:
        for key in self.runs.with_runtime(runtime):
            self.notify(key)


@dataclass(kw_only=True)
class Reflector:
    """Keeps a sink equal to what the API server has of one kind."""

    kube: Kube
    kind: str
    sink: Sink
    query: Mapping[str, str] = field(default_factory=dict)
    synced: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """List, then watch, for ever; list again when the watch has lost its place."""
        version, failures = None, 0
        while True:
            try:
                version = version or await self._list()
                version = await self._watch(version)
                failures = 0
            except _TROUBLES as error:
                gone = isinstance(error, ApiError) and error.status == 410
                version, failures = (None if gone else version), failures + 1
                WATCH_FAILURES.labels(kind=self.kind).inc()
                pause = min(2.0 ** min(failures, 10) / 2, _LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1)
                logger.log(
                    logging.DEBUG if gone or failures == 1 else logging.WARNING,
                    "watching %ss: %s; again in %.1f s",
                    self.kind,
                    error or type(error).__name__,
                    pause,
                )
                await asyncio.sleep(pause)

    async def _list(self) -> str:
        seen: set[tuple[str, str]] = set()
        version = ""
        async for page in self.kube.pages(path(self.kind), query=self.query):
            for raw in page["items"]:
                self.sink.put({"kind": self.kind, **raw})
                seen.add((raw["metadata"].get("namespace", ""), raw["metadata"]["name"]))
            version = page["metadata"]["resourceVersion"]
            await asyncio.sleep(0)  # a page is some milliseconds of work; others get their turn
        self.sink.replace(seen)
        self.synced.set()
        return version

    async def _watch(self, version: str) -> str:
        query = {**self.query, "timeoutSeconds": str(random.randint(240, 480))}
        async for event in self.kube.watch(path(self.kind), query=query, version=version):
            raw = event["object"]
            version = raw["metadata"]["resourceVersion"]
            if event["type"] in ("ADDED", "MODIFIED"):
                self.sink.put(raw)
            elif event["type"] == "DELETED":
                self.sink.drop(raw)
            WATCH_EVENTS.labels(kind=self.kind).inc()
        return version


def reflectors(
    kube: Kube, *, cluster: Cluster, runs: Runs, runtimes: dict[str, Raw], notify: Notify
) -> tuple[Reflector, ...]:
    """One reflector for each kind that a run's state depends on, besides the runs."""
    ours = {"labelSelector": RUN_LABEL}
    return (
        Reflector(kube=kube, kind="TrainingRuntime", sink=RuntimeSink(runtimes=runtimes, runs=runs, notify=notify)),
        Reflector(kube=kube, kind="Job", query=ours, sink=_sink(cluster.jobs, job_record, notify)),
        Reflector(kube=kube, kind="Deployment", query=ours, sink=_sink(cluster.deployments, deployment_record, notify)),
        Reflector(kube=kube, kind="Pod", query=ours, sink=_sink(cluster.pods, pod_record, notify)),
    )


def _sink(cache: Cache[R], record: Callable[[Raw], R], notify: Notify) -> CacheSink:
    return CacheSink(cache=cache, record=record, notify=notify)


def registry(kube: Kube, *, runs: Runs, notify: Notify, forget: Notify) -> kopf.OperatorRegistry:
    """kopf's handlers: a login like ours, and the one on TrainingRun events."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    async def log_in(**_: Any) -> kopf.ConnectionInfo:
        return await _connection(kube)

    @kopf.on.event(GROUP, VERSION, "trainingruns", registry=handlers)
    async def on_run(event: Any, **_: Any) -> None:
        raw = event["object"]
        WATCH_EVENTS.labels(kind="TrainingRun").inc()
        if event["type"] == "DELETED":
            forget(key_of(raw))
        elif runs.put(dict(raw)):
            notify(key_of(raw))

    return handlers


async def _connection(kube: Kube) -> kopf.ConnectionInfo:
    """What kopf needs to speak to the same API server as the same user; it asks again when a token has expired."""
    configuration = kube.configuration
    scheme, _, token = (await kube.authorization()).rpartition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        scheme=scheme.capitalize() or None,
        token=token or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
    )


def settings() -> kopf.OperatorSettings:
    """kopf as a watcher only: it posts nothing, stores nothing, and keeps no idle workers."""
    chosen = kopf.OperatorSettings()
    chosen.posting.enabled = False
    chosen.scanning.disabled = True
    chosen.watching.chunk_size = 500
    chosen.queueing.idle_timeout = 0.1
    chosen.networking.error_backoffs = (1, 2, 4, 8, 16)
    return chosen


async def wait_for_definitions(kube: Kube, *, pause_seconds: float = 2.0) -> None:
    """Wait until the API server serves Headrace's kinds: kopf looks for them only once."""
    while True:
        try:
            await kube.get(path("TrainingRun"), limit="1")
            await kube.get(path("TrainingRuntime"), limit="1")
            return
        except ApiError as error:
            if error.status != 404:
                raise
            logger.warning("the API server does not know TrainingRuns yet: install the CustomResourceDefinitions")
        except _TROUBLES as error:
            logger.warning("the API server: %s", error or type(error).__name__)
        await asyncio.sleep(pause_seconds)
