"""Watches runtimes and the runs' children: a paged list, then a watch with a label selector, stored as trimmed records.

Decides nothing: a change updates a cache and queues the run's key. ``run_watch`` does the same for the runs.
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
"""A watch that ends sooner, as behind some proxies, counts as a failure, lest we restart it in a tight loop."""
_ATTEMPTS_FROM_ONE_PLACE = 3
"""How often the server may refuse to resume from a version before we list again."""
WATCH_SECONDS = 15
"""How long a watch lasts. The server ends it, so silence past that means a dead connection. It sends a bookmark
shortly before, so the version to resume from is never old."""
WATCH_SILENCE_SECONDS = WATCH_SECONDS + 5

Notify = Callable[[RunKey], None]


class Sink(Protocol):
    """What a reflector feeds."""

    def put(self, raw: Raw) -> None:
        """Take an added or changed object."""

    def drop(self, raw: Raw) -> None:
        """Take a deleted object; its resourceVersion is that of the deletion."""

    def keep_only(self, uids: Set[str], *, version: int) -> None:
        """Take a complete list: at that version, no other objects exist."""


@dataclass(frozen=True, kw_only=True)
class CacheSink:
    """Fills a cache with records and notifies the runs they belong to."""

    cache: Cache[Any]
    record: Callable[[Raw], Any]
    notify: Notify

    def put(self, raw: Raw) -> None:
        """Store an object's record. Skips objects that merely carry our labels."""
        try:
            record = self.record(raw)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s %s is not Headrace's: %r", raw.get("kind"), raw["metadata"].get("name"), error)
            return
        if self.cache.put(record):
            self.notify(RunKey(record.namespace, record.run))

    def drop(self, raw: Raw) -> None:
        meta = raw["metadata"]
        key = self.cache.drop(meta["namespace"], meta["name"], uid=meta["uid"], version=version_of(raw))
        if key is not None:
            self.notify(key)

    def keep_only(self, uids: Set[str], *, version: int) -> None:
        for key in self.cache.keep_only(uids, version=version):
            self.notify(key)


@dataclass(frozen=True, kw_only=True)
class RuntimeSink:
    """Stores TrainingRuntimes and notifies the runs that use a changed one."""

    runtimes: Store[str, Raw]
    runs: Runs
    notify: Notify

    def put(self, raw: Raw) -> None:
        meta = raw["metadata"]
        if self.runtimes.put(meta["name"], Entry(uid=meta["uid"], version=version_of(raw), value=raw)):
            self._wake(meta["name"])

    def drop(self, raw: Raw) -> None:
        meta = raw["metadata"]
        if self.runtimes.drop(meta["name"], uid=meta["uid"], version=version_of(raw)) is not None:
            self._wake(meta["name"])

    def keep_only(self, uids: Set[str], *, version: int) -> None:
        for name, _ in self.runtimes.keep_only(uids, version=version):
            self._wake(name)

    def _wake(self, runtime: str) -> None:
        for key in self.runs.with_runtime(runtime):
            self.notify(key)


@dataclass(kw_only=True)
class Reflector:
    """Keeps a sink in sync with the API server's objects of one kind."""

    kube: Kube
    kind: str
    sink: Sink
    query: Mapping[str, str] = field(default_factory=dict)
    synced: asyncio.Event = field(default_factory=asyncio.Event)
    _place: str | None = None
    """resourceVersion of the last event or list: where the next watch resumes."""

    async def run(self) -> None:
        """List, then watch, for ever. List again when the watch cannot resume."""
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
            logger.log(level, "watching %ss: %s; retrying in %.1f s", self.kind, said, pause)
            await asyncio.sleep(pause)

    async def _follow(self) -> Exception | None:
        """List unless there is a version to resume from, then watch. Returns the error that ended it, if any."""
        try:
            if self._place is None:
                self._place = await self._list()
            await self._watch(self._place)
        except _TROUBLES as error:
            return error
        except Exception as error:
            # An object we could not handle; the next list brings its newest state.
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
            await asyncio.sleep(0)  # a page takes milliseconds to process; let other tasks run
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
    """Whether a watch cannot resume: its version has expired, or lies in the future, as after an etcd restore."""
    return trouble.status == 410 or (trouble.status in (400, 504) and failures > _ATTEMPTS_FROM_ONE_PLACE)


def pause_seconds(failures: int) -> float:
    """The back-off after consecutive failures (at least 1). Short, so that a recovered server is not kept waiting."""
    return float(min(2.0 ** min(failures, 10) / 4, _LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1))


def reflectors(
    kube: Kube, *, cluster: Cluster, runs: Runs, runtimes: Store[str, Raw], notify: Notify
) -> tuple[Reflector, ...]:
    """One reflector for each kind that a run's state depends on, besides the run itself."""
    ours = {"labelSelector": RUN_LABEL}
    return (
        Reflector(kube=kube, kind="TrainingRuntime", sink=RuntimeSink(runtimes=runtimes, runs=runs, notify=notify)),
        Reflector(kube=kube, kind="Job", query=ours, sink=_sink(cluster.jobs, job_record, notify)),
        Reflector(kube=kube, kind="Deployment", query=ours, sink=_sink(cluster.deployments, deployment_record, notify)),
        Reflector(kube=kube, kind="Pod", query=ours, sink=_sink(cluster.pods, pod_record, notify)),
    )


def _sink(cache: Cache[R], record: Callable[[Raw], R], notify: Notify) -> CacheSink:
    return CacheSink(cache=cache, record=record, notify=notify)
