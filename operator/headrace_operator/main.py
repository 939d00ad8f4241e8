"""The operator's process: ``python -m headrace_operator.main``.

Every replica serves health and metrics. The one that holds the Lease watches and reconciles, until it is told to stop
or loses the Lease; a lost Lease ends the process, so that two never act at once.
"""

import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, cast

import aiohttp
import kopf
from aiohttp import web
from kubernetes.aio.config import ConfigException

from headrace_operator import logs, metrics
from headrace_operator.body import watch
from headrace_operator.body.apply import Writer
from headrace_operator.body.caches import Cluster, RunKey
from headrace_operator.body.kube import ApiError, Kube, Raw, path
from headrace_operator.body.queue import WorkQueue
from headrace_operator.body.reconcile import Reconciler
from headrace_operator.body.runs import Runs, key_of
from headrace_operator.leader import Leadership, LeaseSettings
from headrace_operator.progress import ProgressEndpoint, TokenReviews
from headrace_operator.settings import Settings
from headrace_operator.web import application, serve

logger = logging.getLogger("headrace_operator")

LEADER_LABEL = "headrace.dev/leader"
"""The Service for progress selects the pod that carries it."""


class Operator:
    """The parts of one replica, wired together."""

    def __init__(self, settings: Settings, kube: Kube) -> None:
        self._settings, self._kube = settings, kube
        self._runs, self._runtimes, self._cluster = Runs(), dict[str, Raw](), Cluster()
        self._stop = asyncio.Event()
        self._synced = False
        self._leading = False
        self._reconciler = Reconciler(
            runs=self._runs,
            runtimes=self._runtimes,
            cluster=self._cluster,
            writer=Writer(kube, cluster=self._cluster, runs=self._runs),
            progress_url=settings.progress_url,
        )
        self._queue: WorkQueue[RunKey] = WorkQueue(self._reconciler)
        lease = LeaseSettings(namespace=settings.namespace, name=settings.lease, identity=settings.identity)
        self._leadership = Leadership(kube, lease)
        metrics.QUEUE_DEPTH.set_function(lambda: len(self._queue))
        metrics.register_runs(lambda: self._runs, lambda raw: self._cluster.progress.of_run(key_of(raw)))

    async def run(self) -> bool:
        """Run until told to stop; False if something else ended it."""
        self._listen_to_signals()
        server = await self._serve()
        try:
            await self._show_leadership(False)
            if not await self._unless_stopped(self._leadership.acquire()):
                return True
            self._leading = True
            metrics.LEADER.set(1)
            return await self._lead(server)
        finally:
            await server.cleanup()

    async def _lead(self, server: web.AppRunner) -> bool:
        """Everything that only the leader does. The tasks that may write end before the Lease is let go."""
        acting = [
            asyncio.create_task(self._leadership.hold(), name="lease"),
            *(asyncio.create_task(r.run(), name=f"watch {r.kind}") for r in self._reflectors()),
            asyncio.create_task(self._work(), name="work"),
            asyncio.create_task(self._show_leadership(True), name="label"),
            asyncio.create_task(self._stop.wait(), name="stop"),
        ]
        ended = await _first_ended(acting, ignored={"label"})
        self._leading = False
        metrics.LEADER.set(0)
        await server.cleanup()
        self._stop.set()
        await _cancel(acting)
        if ended == "stop":
            await self._leadership.release()
        return ended == "stop"

    def _reflectors(self) -> tuple[watch.Reflector, ...]:
        self._watches = watch.reflectors(
            self._kube, cluster=self._cluster, runs=self._runs, runtimes=self._runtimes, notify=self._queue.add
        )
        return self._watches

    async def _work(self) -> None:
        """Watch runs, and work on them once their children are known: before that, every attempt would look lost."""
        await watch.wait_for_definitions(self._kube)
        for reflector in self._watches:
            await reflector.synced.wait()
        self._synced = True
        logger.info("watching; %d jobs, %d pods", len(self._cluster.jobs), len(self._cluster.pods))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._queue.run(num_workers=self._settings.workers), name="queue")
            group.create_task(self._watch_runs(), name="kopf")

    async def _watch_runs(self) -> None:
        before = asyncio.all_tasks()
        handlers = watch.registry(self._kube, runs=self._runs, notify=self._queue.add, forget=self._reconciler.forget)
        tasks = await kopf.spawn_tasks(
            registry=handlers,
            settings=watch.settings(),
            # Else kopf asks for the user's name, and an id that a cluster gives out has none.
            identity=cast(Any, self._settings.identity),
            standalone=True,
            clusterwide=True,
            stop_flag=self._stop,
        )
        self._listen_to_signals()  # kopf has taken them
        await kopf.run_tasks(tasks, ignored=before)

    async def _serve(self) -> web.AppRunner:
        reviews = TokenReviews(self._kube)
        progress = ProgressEndpoint(
            reviews, cluster=self._cluster, notify=self._queue.add, leads=lambda: self._leading and self._synced
        )
        app = application(progress, ready=lambda: self._synced or not self._leading)
        return await serve(app, host=self._settings.host, port=self._settings.port)

    async def _show_leadership(self, leads: bool) -> None:
        """Label this replica's pod, so that the Service sends reports to the leader; tries until it has succeeded."""
        if self._settings.pod is None:
            return
        address = path("Pod", namespace=self._settings.namespace, name=self._settings.pod)
        body = {"metadata": {"labels": {LEADER_LABEL: "true" if leads else None}}}
        while True:
            try:
                await self._kube.request("PATCH", address, body=body, content_type="application/merge-patch+json")
                return
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                logger.warning("labelling pod %s: %s", self._settings.pod, error or type(error).__name__)
                await asyncio.sleep(2)

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Whether some work was done before the process was told to stop."""
        tasks = [asyncio.create_task(work, name="wait"), asyncio.create_task(self._stop.wait(), name="stop")]
        ended = await _first_ended(tasks)
        await _cancel(tasks)
        return ended == "wait"

    def _listen_to_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)


async def _first_ended(tasks: list[asyncio.Task[Any]], *, ignored: frozenset[str] | set[str] = frozenset()) -> str:
    """The name of the task that ended first; says why if it failed."""
    waited = [t for t in tasks if t.get_name() not in ignored]
    done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        if not task.cancelled() and task.exception() is not None:
            logger.error("%s failed", task.get_name(), exc_info=task.exception())
    names = {t.get_name() for t in done}
    return "stop" if names == {"stop"} else next(iter(names - {"stop"}))


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task


async def run(settings: Settings) -> bool:
    """Run one replica; False if it ended without being told to."""
    try:
        kube = await Kube.connect()
    except ConfigException as error:
        logger.error("no way to the API server: %s; run in a pod with a service account, or set KUBECONFIG", error)
        return False
    try:
        return await Operator(settings, kube).run()
    finally:
        await kube.close()


def main() -> int:
    """Run one replica with the settings of the environment."""
    try:
        settings = Settings.from_environment()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(level=settings.log_level, style=settings.log_format)
    return 0 if asyncio.run(run(settings)) else 1


if __name__ == "__main__":
    sys.exit(main())
