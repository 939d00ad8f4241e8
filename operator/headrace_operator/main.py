"""The operator's process: ``python -m headrace_operator.main``.

Every replica serves health and metrics and keeps its caches warm. The one that holds the Lease reconciles. A replica
that loses the Lease cancels its work and stands by again; from the moment it loses it, its writes are refused
(``Kube.fenced``).
"""

import asyncio
import logging
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

import aiohttp
from aiohttp import web
from kubernetes.aio.config import ConfigException

from headrace_operator import logs, metrics
from headrace_operator.body import watch
from headrace_operator.body.apply import Writer
from headrace_operator.body.caches import Cluster, RunKey
from headrace_operator.body.kube import ApiError, Kube, path, words
from headrace_operator.body.queue import WorkQueue
from headrace_operator.body.raw import Raw
from headrace_operator.body.reconcile import Reconciler
from headrace_operator.body.run_watch import RunWatch
from headrace_operator.body.runs import Runs, uid_of
from headrace_operator.body.store import Store
from headrace_operator.leader import Leadership, LeaseSettings
from headrace_operator.progress import ProgressEndpoint, TokenReviews
from headrace_operator.settings import Settings
from headrace_operator.web import application, serve

logger = logging.getLogger("headrace_operator")

LEADER_LABEL = "headrace.dev/leader"
"""The progress Service selects the pod that carries it."""


class Term:
    """State of one leadership term: created when it begins, dropped when it ends."""

    def __init__(self, operator: "Operator") -> None:
        writes = operator.kube.fenced(operator.leadership.leads)
        self.reconciler = Reconciler(
            runs=operator.runs,
            runtimes=operator.runtimes,
            cluster=operator.cluster,
            writer=Writer(writes, cluster=operator.cluster, runs=operator.runs),
            progress_url=operator.settings.progress_url,
        )
        self.queue: WorkQueue[RunKey] = WorkQueue(self.reconciler)


class Operator:
    """One replica, wired together."""

    def __init__(self, settings: Settings, kube: Kube) -> None:
        self.settings, self.kube = settings, kube
        self.runs, self.runtimes, self.cluster = Runs(), Store[str, Raw](), Cluster()
        lease = LeaseSettings(namespace=settings.namespace, name=settings.lease, identity=settings.identity)
        self._lease_kube = kube.apart(pool_size=2)
        self.leadership = Leadership(self._lease_kube, lease)
        self._term: Term | None = None
        """Set while this replica acts."""
        self._stop = asyncio.Event()
        self._run_watch = RunWatch(
            kube=kube, runs=self.runs, notify=self._notify, forget=self._forget, identity=settings.identity
        )
        self._reflectors = watch.reflectors(
            kube, cluster=self.cluster, runs=self.runs, runtimes=self.runtimes, notify=self._notify
        )
        self._label = LeaderLabel(kube, settings)
        metrics.QUEUE_DEPTH.set_function(lambda: len(self._term.queue) if self._term is not None else 0)
        metrics.LEADER.set_function(self.leadership.leads)

    async def run(self) -> bool:
        """Run until told to stop; False if anything else ended it."""
        self._listen_to_signals()
        server = await self._serve()
        tasks = [
            asyncio.create_task(self._run_watch.run(), name="watch TrainingRun"),
            *(asyncio.create_task(r.run(), name=f"watch {r.kind}") for r in self._reflectors),
            asyncio.create_task(self._label.run(), name="label"),
            asyncio.create_task(self._terms(), name="terms"),
            asyncio.create_task(self._stop.wait(), name="stop"),
        ]
        ended = await _first_ended(tasks)
        await server.cleanup()
        await _cancel(tasks)
        if self.leadership.leads():
            await self.leadership.release()
        await self._lease_kube.close()
        return ended == "stop"

    async def _terms(self) -> None:
        """Lead whenever possible. A term is over once all of its work is cancelled."""
        while True:
            await self.leadership.acquire()
            acting = [
                asyncio.create_task(self.leadership.hold(), name="lease"),
                asyncio.create_task(self._act(), name="work"),
            ]
            try:
                ended = await _first_ended(acting)
            finally:
                self._term = None
                self._label.show(False)
                await _cancel(acting)
            if ended != "lease":
                raise RuntimeError("the work queue stopped")

    async def _act(self) -> None:
        """Reconcile runs, once they and their children are known: before that, every attempt would look lost.

        Runs are listed again: what is known from another leader's term may be stale. Children need no fresh list, since
        their names identify the attempts, and the runs' statuses say which should exist.
        """
        self.cluster.progress.clear()
        self.cluster.refusals.clear()
        for reflector in self._reflectors:
            await reflector.synced.wait()
        await self._run_watch.resync_surely()
        self._term = term = Term(self)
        self._label.show(True)
        for key in self.runs:
            term.queue.add(key)
        logger.info(
            "acting on %d runs; %d jobs, %d pods", len(self.runs), len(self.cluster.jobs), len(self.cluster.pods)
        )
        await term.queue.run(num_workers=self.settings.workers)

    def _notify(self, key: RunKey) -> None:
        if self._term is not None:
            self._term.queue.add(key)

    def _notify_in_its_turn(self, key: RunKey, run_uid: str) -> None:
        if self._term is not None and (seconds := self._term.reconciler.seconds_to_progress(run_uid)) is not None:
            self._term.queue.add_after(key, seconds)

    def _forget(self, key: RunKey, run_uid: str) -> None:
        self.cluster.progress.forget(run_uid)
        if self._term is not None:
            self._term.reconciler.forget(key, run_uid)

    def _led_runs(self) -> list[metrics.RunAndReports]:
        """The runs whose metrics this replica exports: only the leader exports any."""
        if self._term is None:
            return []
        known = [raw for key in self.runs if (raw := self.runs.get(key)) is not None]
        return [(raw, self.cluster.progress.of_run(uid_of(raw))) for raw in known]

    def _is_synced(self) -> bool:
        return all(reflector.synced.is_set() for reflector in self._reflectors)

    async def _serve(self) -> web.AppRunner:
        reviews = TokenReviews(self.kube)
        progress = ProgressEndpoint(
            reviews,
            cluster=self.cluster,
            news=self._notify,
            figures=self._notify_in_its_turn,
            leads=lambda: self._term is not None,
        )
        app = application(progress, ready=self._is_synced, runs=self._led_runs)
        return await serve(app, host=self.settings.host, port=self.settings.port)

    def _listen_to_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)


class LeaderLabel:
    """Labels this replica's pod, so that the Service routes reports to the leader."""

    def __init__(self, kube: Kube, settings: Settings) -> None:
        self._kube, self._settings = kube, settings
        self._leads = False
        self._changed = asyncio.Event()
        self._changed.set()  # after a container restart, the pod may still carry the old label

    def show(self, leads: bool) -> None:
        """Set whether the label says that this replica leads."""
        self._leads = leads
        self._changed.set()

    async def run(self) -> None:
        """Write the label on every change, retrying until it succeeds."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._settings.pod is not None and not await self._write(self._settings.pod, leads=self._leads):
                self._changed.set()
                await asyncio.sleep(2)

    async def _write(self, pod: str, *, leads: bool) -> bool:
        address = path("Pod", namespace=self._settings.namespace, name=pod)
        body = {"metadata": {"labels": {LEADER_LABEL: "true" if leads else None}}}
        try:
            await self._kube.request("PATCH", address, body=body, content_type="application/merge-patch+json")
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            logger.warning("labelling pod %s: %s", pod, words(error))
            return False
        return True


async def _first_ended(tasks: list[asyncio.Task[Any]]) -> str:
    """The name of the task that ended first; logs its error if it failed."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
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
        logger.error("cannot reach the API server: %s; run in a pod with a service account, or set KUBECONFIG", error)
        return False
    try:
        return await Operator(settings, kube).run()
    finally:
        await kube.close()


def allow_many_connections() -> None:
    """Raise the limit on open files to the hard limit: every reporting pod keeps a connection open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> int:
    """Run one replica, configured by the environment."""
    try:
        settings = Settings.from_environment()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    allow_many_connections()
    logs.configure(level=settings.log_level, style=settings.log_format)
    return 0 if asyncio.run(run(settings)) else 1


if __name__ == "__main__":
    sys.exit(main())
