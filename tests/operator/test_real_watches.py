"""Watches against a real API server, with faults in between: the caches always converge to the server's state."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from headrace_operator.body.caches import RunKey
from headrace_operator.body.kube import ApiError, Kube, Raw
from headrace_operator.body.run_watch import RunWatch, settings
from headrace_operator.body.runs import Runs, uid_of
from headrace_operator.body.watch import Reflector
from proxies import ApiProxy, always
from world import Json, World, make_run

pytestmark = pytest.mark.slow


@dataclass
class Names:
    """A sink that knows the ConfigMaps that there are."""

    uids: dict[str, str] = field(default_factory=dict)

    def put(self, raw: Raw) -> None:
        self.uids[raw["metadata"]["name"]] = raw["metadata"]["uid"]

    def drop(self, raw: Raw) -> None:
        self.uids.pop(raw["metadata"]["name"], None)

    def keep_only(self, uids: Any, *, version: int) -> None:
        self.uids = {name: uid for name, uid in self.uids.items() if uid in uids}


@asynccontextmanager
async def running(kube: Kube, work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Some work, until the test is done with it."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await kube.close()


async def soon(holds: Callable[[], Any], *, timeout_seconds: float = 120.0) -> Any:
    async with asyncio.timeout(timeout_seconds):
        while not (answer := holds()):
            await asyncio.sleep(0.05)
    return answer


class Cases:
    """ConfigMaps of a test, watched by way of a proxy."""

    def __init__(self, world: World, proxy: ApiProxy) -> None:
        self.world, self.proxy, self.sink = world, proxy, Names()

    async def reflector(self) -> tuple[Kube, Reflector]:
        kube = await Kube.connect(kubeconfig=self.world.plane.write_kubeconfig("proxied", server=self.proxy.url))
        query = {"labelSelector": f"test={self.world.namespace}"}
        return kube, Reflector(kube=kube, kind="ConfigMap", sink=self.sink, query=query)

    async def make(self, name: str) -> None:
        labels = {"test": self.world.namespace}
        obj = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": self.world.namespace}}
        await asyncio.to_thread(self.world.plane.apply, {**obj, "metadata": {**obj["metadata"], "labels": labels}})

    async def delete(self, name: str) -> None:
        await asyncio.to_thread(self.world.plane.kubectl, "-n", self.world.namespace, "delete", "configmap", name)

    def watched_from(self) -> list[str]:
        return [r.query["resourceVersion"] for r in list(self.proxy.asked) if r.query.get("watch") == "true"]


@pytest.fixture
def cases(world: World, api_proxy: ApiProxy) -> Cases:
    return Cases(world, api_proxy)


def test_a_watch_that_breaks_goes_on_after_its_last_event(cases: Cases) -> None:
    told: list[str] = []

    def break_after_two(_: web.Request, event: Json) -> list[Json]:
        if len(told) == 2:
            told.append("broken")
            raise ConnectionError
        if event["type"] == "ADDED":
            told.append(event["object"]["metadata"]["resourceVersion"])
        return [event]

    async def main() -> None:
        cases.proxy.streamed = break_after_two
        kube, reflector = await cases.reflector()
        async with running(kube, reflector.run()):
            await soon(lambda: cases.watched_from())
            for name in ("one", "two", "three"):
                await cases.make(name)
            await soon(lambda: "three" in cases.sink.uids)

    asyncio.run(main())
    assert told[2] == "broken"
    assert cases.watched_from()[1] == told[1], "not from the list, which would tell the first two again"
    assert cases.proxy.count("GET", "limit=") == 1, "nor was anything listed again"


def test_a_server_that_ends_watches_at_once_is_not_asked_without_end(cases: Cases) -> None:
    async def at_once(request: web.Request) -> web.StreamResponse | None:
        return web.Response(text="") if request.query.get("watch") == "true" else None

    async def main() -> None:
        cases.proxy.faults.append(at_once)
        kube, reflector = await cases.reflector()
        async with running(kube, reflector.run()):
            await soon(lambda: cases.watched_from())
            await asyncio.sleep(4)
            assert 2 <= len(cases.watched_from()) <= 6
            cases.proxy.faults.clear()
            await cases.make("late")
            await soon(lambda: "late" in cases.sink.uids)

    asyncio.run(main())


@pytest.mark.parametrize(
    "line",
    [
        {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}},
        {"type": "ERROR", "object": {"kind": "Status", "code": 500, "reason": "InternalError", "message": "etcd"}},
        {"type": "ADDED", "object": {"kind": "ConfigMap"}},
        {"nothing": "known"},
    ],
    ids=["410", "500", "no metadata", "no event"],
)
def test_whatever_a_stream_says_the_watch_goes_on(cases: Cases, line: Json) -> None:
    odd = [line]

    def once(_: web.Request, event: Json) -> list[Json]:
        return [odd.pop(), event] if odd else [event]

    async def main() -> None:
        cases.proxy.streamed = once
        kube, reflector = await cases.reflector()
        async with running(kube, reflector.run()) as task:
            await soon(lambda: cases.watched_from())
            await cases.make("one")
            await soon(lambda: "one" in cases.sink.uids)
            await cases.make("two")
            await soon(lambda: "two" in cases.sink.uids)
            assert not odd and not task.done()

    asyncio.run(main())


def test_what_was_deleted_while_nobody_watched_is_forgotten(cases: Cases) -> None:
    async def main() -> None:
        kube, reflector = await cases.reflector()
        async with running(kube, reflector.run()):
            await cases.make("ghost")
            await soon(lambda: "ghost" in cases.sink.uids)
            await soon(lambda: cases.watched_from())
            cases.proxy.faults.append(always(410, '{"reason": "Expired"}', part="watch=true"))
            await cases.delete("ghost")
            await soon(lambda: "ghost" not in cases.sink.uids)

    asyncio.run(main())


@dataclass
class Watched:
    """TrainingRuns as a RunWatch keeps them."""

    world: World
    proxy: ApiProxy
    runs: Runs = field(default_factory=Runs)
    told: list[RunKey] = field(default_factory=list)
    forgotten: list[tuple[RunKey, str]] = field(default_factory=list)

    @property
    def key(self) -> RunKey:
        return RunKey(self.world.namespace, "demo")

    def name_of(self, raw: Json) -> str:
        return str(raw["metadata"].get("annotations", {}).get("try", ""))

    async def watch(self, **times: float) -> tuple[Kube, RunWatch]:
        kube = await Kube.connect(kubeconfig=self.world.plane.write_kubeconfig("proxied", server=self.proxy.url))
        return kube, self.run_watch(kube, **times)

    def run_watch(self, kube: Any, **times: float) -> RunWatch:
        def forget(key: RunKey, uid: str) -> None:
            self.forgotten.append((key, uid))

        return RunWatch(kube=kube, runs=self.runs, notify=self.told.append, forget=forget, identity="test", **times)

    async def apply(self, label: str) -> None:
        run = make_run(self.world.namespace, "corpus")
        run["metadata"]["annotations"] = {"try": label}
        await asyncio.to_thread(self.world.plane.apply, run)

    async def seen(self, label: str) -> None:
        await soon(lambda: (raw := self.runs.get(self.key)) is not None and self.name_of(raw) == label)


@pytest.fixture
def watched(world: World, api_proxy: ApiProxy) -> Watched:
    return Watched(world, api_proxy)


@pytest.mark.parametrize("code", [410, 500])
def test_an_error_in_kopfs_watch_is_not_the_end(watched: Watched, code: int) -> None:
    odd = [{"type": "ERROR", "object": {"kind": "Status", "code": code, "message": "etcd is away"}}]

    def once(request: web.Request, event: Json) -> list[Json]:
        return [odd.pop(), event] if odd and "trainingruns" in request.path else [event]

    async def main() -> None:
        kube, watch = await watched.watch()
        async with running(kube, watch.run()) as task:
            await watched.apply("one")
            await watched.seen("one")
            watched.proxy.streamed = once
            await watched.apply("two")
            await watched.seen("two")
            await watched.apply("three")
            await watched.seen("three")
            assert not odd and not task.done()

    asyncio.run(main())


def test_kopf_that_watches_nothing_is_found_out_and_started_again(watched: Watched) -> None:
    """It looks once which kinds are served, and one of several API servers may not know yet."""

    async def none_of_ours(request: web.Request) -> web.StreamResponse | None:
        return web.json_response({"kind": "APIGroupList", "groups": []}) if request.path == "/apis" else None

    async def main() -> None:
        watched.proxy.faults.append(none_of_ours)
        kube, watch = await watched.watch(first_check_seconds=1.0)
        async with running(kube, watch.run()):
            await watched.apply("one")
            await watched.seen("one")  # by the list
            assert watched.proxy.count("GET", "trainingruns?watch") == 0
            watched.proxy.faults.clear()
            await soon(lambda: watched.proxy.count("GET", "watch=true"))
            await watched.apply("two")
            await watched.seen("two")

    asyncio.run(main())


def test_a_run_that_was_deleted_while_kopf_did_not_watch_is_forgotten(watched: Watched) -> None:
    async def main() -> None:
        kube, watch = await watched.watch(first_check_seconds=1.0, check_seconds=1.0)
        async with running(kube, watch.run()):
            await watched.apply("one")
            await watched.seen("one")
            gone = watched.runs.get(watched.key)
            assert gone is not None
            await asyncio.to_thread(watched.world.plane.kubectl, "-n", watched.key.namespace, "delete", "trun", "demo")
            await soon(lambda: watched.runs.get(watched.key) is None)
            assert not watched.runs.put(gone), "an old event of it does not bring it back"
            older = json.loads(json.dumps(gone))
            older["metadata"]["uid"] = "uid-of-a-ghost"
            watched.runs.put(older)  # as a lagging watch might say of a run that nobody knows
            await soon(lambda: watched.runs.get(watched.key) is None)

    asyncio.run(main())


def test_the_news_of_two_runs_of_one_name_may_come_in_any_order(watched: Watched) -> None:
    async def main() -> list[Json]:
        await watched.apply("old")
        old = watched.world.run()
        replace = ["replace", "--force", "-f", "-"]
        run = make_run(watched.world.namespace, "corpus")
        await asyncio.to_thread(watched.world.plane.kubectl, *replace, stdin=json.dumps(run))
        return [old, watched.world.run()]

    old, new = asyncio.run(main())
    assert uid_of(old) != uid_of(new)
    gone = {**old, "metadata": {**old["metadata"], "resourceVersion": str(int(old["metadata"]["resourceVersion"]) + 1)}}
    watch = watched.run_watch(None)
    for event in ({"type": "ADDED", "object": new}, {"type": "DELETED", "object": gone}):
        watch.take(event)
    assert watched.runs.get(watched.key) is not None
    assert uid_of(watched.runs.get(watched.key) or {}) == uid_of(new)
    assert watched.forgotten == [(watched.key, uid_of(old))]
    watch.take({"type": "MODIFIED", "object": old})
    assert uid_of(watched.runs.get(watched.key) or {}) == uid_of(new)


def test_kopf_never_ends_the_process() -> None:
    assert settings().process.ultimate_exiting_timeout is None


def test_something_else_than_an_object_is_an_error_of_the_server(cases: Cases) -> None:
    async def main() -> None:
        kube, _ = await cases.reflector()
        for text in ("<html>please log in</html>", "[]", ""):
            cases.proxy.faults[:] = [always(200, text)]
            with pytest.raises(ApiError, match="NotAnObject"):
                await kube.get("/api/v1/namespaces")
        await kube.close()

    asyncio.run(main())
