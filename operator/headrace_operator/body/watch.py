"""Where changes of runtimes and of runs' children come in: pages and watches with a label selector, kept as trimmed records.

Nothing is decided here: a change updates a cache and puts the run's key in the queue. ``run_watch`` does it for the runs.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

from headrace_operator.body.build.names import RUN_LABEL
from headrace_operator.body.caches import Cache, Cluster, R, RunKey
from headrace_operator.body.kube import ApiError, Kube, path, version_of, words
from headrace_operator.body.raw import Raw
from headrace_operator.body.records import deployment_record, job_record, pod_record
from headrace_operator.body.runs import Runs
from headrace_operator.body.store import Entry, Store
from headrace_operator.metrics import WATCH_EVENTS, WATCH_FAILURES

logger = logging.getLogger(__name__)

_TROUBLES = (ApiError, aiohttp.ClientError, TimeoutError)
_LONGEST_PAUSE_SECONDS = 5.0
_SHORT_SECONDS = 5.0
"""A watch that ends sooner, as behind some proxies, counts as a failure: else it would be begun again without end."""
_ATTEMPTS_FROM_ONE_PLACE = 3
"""How often a server may refuse to go on from a place before everything is listed again."""
WATCH_SECONDS = 15
"""How long a watch lasts. The server ends it, so silence beyond that means that the connection is dead; and since it
sends a bookmark shortly before, the place is never old."""
WATCH_SILENCE_SECONDS = WATCH_SECONDS + 5

Notify = Callable[[RunKey], None]


class Sink(Protocol):
    """What a reflector fills."""

    def put(self, raw: Raw) -> None:
        """An object was added or changed."""

    def drop(self, raw: Raw) -> None:
        """An object was deleted; its resourceVersion is that of the deletion."""

    def keep_only(self, uids: Set[str], *, version: int) -> None:
        """At a version these are all objects that there are."""


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
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s %s is not Headrace's: %r", raw.get("kind"), raw["metadata"].get("name"), error)
            return
        if self.cache.put(record):
            self.notify(RunKey(record.namespace, record.run))

    def drop(self, raw: Raw) -> None:
        """Forget an object."""
        meta = raw["metadata"]
        key = self.cache.drop(meta["namespace"], meta["name"], uid=meta["uid"], version=version_of(raw))
        if key is not None:
            self.notify(key)

    def keep_only(self, uids: Set[str], *, version: int) -> None:
        """Forget all others."""
        for key in self.cache.keep_only(uids, version=version):
            self.notify(key)


@dataclass(frozen=True, kw_only=True)
class RuntimeSink:
    """Keeps TrainingRuntimes; wakes the runs that name one that changed."""

    runtimes: Store[str, Raw]
    runs: Runs
    notify: Notify

    def put(self, raw: Raw) -> None:
        """Remember a runtime."""
        meta = raw["metadata"]
        if self.runtimes.put(meta["name"], Entry(uid=meta["uid"], version=version_of(raw), value=raw)):
            self._wake(meta["name"])

    def drop(self, raw: Raw) -> None:
        """Forget a runtime."""
        meta = raw["metadata"]
        if self.runtimes.drop(meta["name"], uid=meta["uid"], version=version_of(raw)) is not None:
            self._wake(meta["name"])

    def keep_only(self, uids: Set[str], *, version: int) -> None:
        """Forget all others."""
        for name, _ in self.runtimes.keep_only(uids, version=version):
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
    _place: str | None = None
    """The resourceVersion of the last event, or of the list: where the next watch goes on."""

    async def run(self) -> None:
        """List, then watch, for ever; list again when the watch has lost its place."""
        loop, failures = asyncio.get_running_loop(), 0
        while True:
            began = loop.time()
            trouble = await self._follow()
            if trouble is None and loop.time() - began >= _SHORT_SECONDS:
                failures = 0
                continue
            failures += 1
            if isinstance(trouble, ApiError) and _has_lost_its_place(trouble, failures=failures):
                self._place = None
            pause, said = pause_seconds(failures), words(trouble) if trouble is not None else "it ended at once"
            WATCH_FAILURES.labels(kind=self.kind).inc()
            level = logging.DEBUG if failures == 1 else logging.WARNING
            logger.log(level, "watching %ss: %s; again in %.1f s", self.kind, said, pause)
            await asyncio.sleep(pause)

    async def _follow(self) -> Exception | None:
        """List if there is no place to go on from, and watch; returns why that ended too early, if it did."""
        try:
            if self._place is None:
                self._place = await self._list()
            await self._watch(self._place)
        except _TROUBLES as error:
            return error
        except Exception as error:
            # Whatever it was that could not be taken, the list has its newest state.
            logger.exception("watching %ss", self.kind)
            self._place = None
            return error
        return None

    async def _list(self) -> str:
        uids: set[str] = set()
        version = ""
        async for page in self.kube.pages(path(self.kind), query=self.query):
            for raw in page["items"]:
                self.sink.put({"kind": self.kind, **raw})
                uids.add(raw["metadata"]["uid"])
            version = page["metadata"]["resourceVersion"]
            await asyncio.sleep(0)  # a page is some milliseconds of work; others get their turn
        self.sink.keep_only(uids, version=int(version))
        self.synced.set()
        return version

    async def _watch(self, version: str) -> None:
        seconds = random.uniform(0.8, 1) * WATCH_SECONDS
        events = self.kube.watch(path(self.kind), query=self.query, version=version, seconds=seconds)
        async for event in events:
            raw = event["object"]
            if event["type"] in ("ADDED", "MODIFIED"):
                self.sink.put(raw)
            elif event["type"] == "DELETED":
                self.sink.drop(raw)
            self._place = raw["metadata"]["resourceVersion"]
            WATCH_EVENTS.labels(kind=self.kind).inc()


def _has_lost_its_place(trouble: ApiError, *, failures: int) -> bool:
    """Whether a watch cannot go on where it was: the server has forgotten that version, or never comes to have it, as
    after etcd was restored."""
    return trouble.status == 410 or (trouble.status in (400, 504) and failures > _ATTEMPTS_FROM_ONE_PLACE)


def pause_seconds(failures: int) -> float:
    """How long to wait after so many failures in a row, at least 1: not so long that a server that is back waits for us."""
    return float(min(2.0 ** min(failures, 10) / 4, _LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1))


def reflectors(
    kube: Kube, *, cluster: Cluster, runs: Runs, runtimes: Store[str, Raw], notify: Notify
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
