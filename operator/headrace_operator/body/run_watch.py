"""Watches TrainingRuns through kopf; periodic lists repair whatever it missed.

kopf's only handler is ``on.event``: no finalizers, annotations or timers. It runs in its own thread and event loop,
because it takes over the main thread's signals and, when it ends, cancels every task in its loop. It handles objects
concurrently, so ``take`` accepts events in any order. It is restarted when it fails or goes deaf.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
import kopf

from headrace_api import GROUP, VERSION
from headrace_operator.body.caches import RunKey
from headrace_operator.body.kube import ApiError, Kube, path, version_of, words
from headrace_operator.body.runs import Runs, key_of, uid_of
from headrace_operator.body.watch import WATCH_SECONDS, WATCH_SILENCE_SECONDS, pause_seconds
from headrace_operator.metrics import WATCH_EVENTS, WATCH_FAILURES

logger = logging.getLogger(__name__)

_STOP_SECONDS = 10.0
_HEARING_SECONDS = 5.0
"""How long kopf may lag behind a list."""
_LONG_SECONDS = 60.0
"""A watch that lasted this long was healthy: the back-off starts over."""


class Deaf(Exception):
    """kopf missed a change."""


@dataclass(kw_only=True)
class RunWatch:
    """Keeps ``Runs`` in sync with the API server's TrainingRuns."""

    kube: Kube
    runs: Runs
    notify: Callable[[RunKey], None]
    forget: Callable[[RunKey, str], None]
    """Called with the key and uid of a deleted run."""
    identity: str
    first_check_seconds: float = 15.0
    check_seconds: float = 300.0
    _heard: int = 0
    """The highest resourceVersion kopf has delivered."""

    async def run(self) -> None:
        """Watch for ever."""
        loop, failures = asyncio.get_running_loop(), 0
        while True:
            await wait_for_definitions(self.kube)
            began = loop.time()
            trouble = await self._watch_until_it_fails()
            WATCH_FAILURES.labels(kind="TrainingRun").inc()
            failures = 1 if loop.time() - began > _LONG_SECONDS else failures + 1
            pause = pause_seconds(failures)
            logger.warning("watching TrainingRuns: %s: %s; retrying in %.1f s", type(trouble).__name__, trouble, pause)
            await asyncio.sleep(pause)

    async def _watch_until_it_fails(self) -> BaseException | None:
        both = [asyncio.create_task(self._kopf(), name="kopf"), asyncio.create_task(self._check(), name="check")]
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        return done.pop().exception()

    def take(self, event: Any) -> None:
        """Take one event. Events of different objects may come in any order."""
        raw = event["object"]
        key, uid = key_of(raw), uid_of(raw)
        WATCH_EVENTS.labels(kind="TrainingRun").inc()
        self._heard = max(self._heard, version_of(raw))
        if event["type"] == "DELETED":
            self.runs.drop(key, uid=uid, version=version_of(raw))
            self.forget(key, uid)
        elif self.runs.put(dict(raw)):
            self.notify(key)

    async def resync(self) -> int:
        """Replace the runs with a fresh list; returns the highest resourceVersion that was new."""
        uids, version, newest = set[str](), 0, 0
        async for page in self.kube.pages(path("TrainingRun"), query={}):
            for raw in page["items"]:
                uids.add(uid_of(raw))
                if self.runs.put(raw):
                    newest = max(newest, version_of(raw))
                    self.notify(key_of(raw))
            version = int(page["metadata"]["resourceVersion"])
            await asyncio.sleep(0)  # a page takes milliseconds to process; let other tasks run
        for raw in self.runs.keep_only(uids, version=version):
            self.forget(key_of(raw), uid_of(raw))
        return newest

    async def resync_surely(self) -> None:
        """Retry ``resync`` until it succeeds."""
        while True:
            try:
                await self.resync()
                return
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                logger.warning("listing TrainingRuns: %s", words(error))
                await asyncio.sleep(pause_seconds(1))

    async def _check(self) -> None:
        """List periodically: kopf reports neither deletions from before its watch, nor that it has gone deaf.

        Raises:
            Deaf: kopf did not deliver a change that a list shows.
        """
        wait = self.first_check_seconds
        while True:
            await asyncio.sleep(wait)
            try:
                newest = await self.resync()
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                logger.warning("listing TrainingRuns: %s", words(error))
                wait = self.first_check_seconds
                continue
            if newest > self._heard:
                await asyncio.sleep(_HEARING_SECONDS)
            if newest > self._heard:
                raise Deaf(f"kopf delivered nothing since version {self._heard}; the API server is at {newest}")
            wait = self.check_seconds

    async def _kopf(self) -> None:
        main = asyncio.get_running_loop()

        def tell(event: Any) -> None:
            main.call_soon_threadsafe(self.take, event)

        async def log_in() -> kopf.ConnectionInfo:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_connection(self.kube), main))

        await _Thread(_registry(log_in, tell), identity=self.identity).run()
        raise RuntimeError("kopf exited")


class _Thread:
    """kopf in its own thread and event loop."""

    def __init__(self, registry: kopf.OperatorRegistry, *, identity: str) -> None:
        self._registry, self._identity = registry, identity
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._ended: Future[None] = Future()

    async def run(self) -> None:
        """Run kopf until it ends. Cancelling this stops it."""
        loop = self._runner.get_loop()
        threading.Thread(target=self._main, name="kopf", daemon=True).start()
        ended = asyncio.wrap_future(self._ended)
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError:
            with suppress(RuntimeError):  # its loop is closed already
                loop.call_soon_threadsafe(_cancel_all)
            await asyncio.wait([ended], timeout=_STOP_SECONDS)
            raise

    def _main(self) -> None:
        try:
            with self._runner:
                self._runner.run(self._kopf())
        except asyncio.CancelledError:
            self._ended.set_result(None)
        except BaseException as error:
            self._ended.set_exception(error)
        else:
            self._ended.set_result(None)

    async def _kopf(self) -> None:
        await kopf.operator(
            registry=self._registry,
            settings=settings(),
            # Without one, kopf looks up the user's name, which an arbitrary container uid does not have.
            identity=cast(Any, self._identity),
            standalone=True,
            clusterwide=True,
        )


def _cancel_all() -> None:
    for task in asyncio.all_tasks():
        task.cancel()


def _registry(log_in: Callable[[], Any], tell: Callable[[Any], None]) -> kopf.OperatorRegistry:
    """kopf's handlers: our login, and one for TrainingRun events."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    async def on_login(**_: Any) -> kopf.ConnectionInfo:
        connection: kopf.ConnectionInfo = await log_in()
        return connection

    @kopf.on.event(GROUP, VERSION, "trainingruns", registry=handlers)
    async def on_run(event: Any, **_: Any) -> None:
        tell(event)

    return handlers


async def _connection(kube: Kube) -> kopf.ConnectionInfo:
    """Connection details for kopf: same API server, same user. kopf asks again when a token expires."""
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
    """kopf as a mere watcher: it posts no events, stores nothing and keeps no idle workers."""
    chosen = kopf.OperatorSettings()
    chosen.posting.enabled = False
    chosen.scanning.disabled = True
    # Otherwise kopf kills the process ten minutes after it ends for any reason but its stop flag.
    chosen.process.ultimate_exiting_timeout = None
    chosen.watching.chunk_size = 500
    chosen.watching.server_timeout = WATCH_SECONDS
    chosen.watching.inactivity_timeout = WATCH_SILENCE_SECONDS
    chosen.watching.reconnect_backoff = 1.0
    chosen.queueing.idle_timeout = 0.1
    chosen.networking.connect_timeout = 5.0
    chosen.networking.request_timeout = 30.0
    chosen.networking.error_backoffs = (0.5, 1, 2, 2)
    return chosen


async def wait_for_definitions(kube: Kube, *, pause_seconds: float = 2.0) -> None:
    """Wait until the API server serves our kinds: kopf looks for them only once."""
    while True:
        try:
            served = await kube.get(f"/apis/{GROUP}/{VERSION}")
            if {"trainingruns", "trainingruntimes"} <= {r["name"] for r in served.get("resources", [])}:
                return
            trouble = "TrainingRun is not installed; install the CustomResourceDefinitions"
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            trouble = words(error)
        logger.warning("waiting for the API server: %s", trouble)
        await asyncio.sleep(pause_seconds)
