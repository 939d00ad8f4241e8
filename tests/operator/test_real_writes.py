"""The operator's writes against a real API server: only to the version it read, and only while it leads."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from headrace_operator.body.apply import Writer
from headrace_operator.body.caches import Cluster
from headrace_operator.body.kube import Kube, NotLeading, path
from headrace_operator.body.queue import Retry
from headrace_operator.body.runs import Runs, key_of, uid_of
from proxies import ApiProxy
from world import Json, World, make_run

pytestmark = pytest.mark.slow


class Looked:
    """A run as the operator has looked at it, and what it would write."""

    def __init__(self, world: World) -> None:
        self.world, self.runs = world, Runs()
        world.plane.apply(make_run(world.namespace, "corpus"))
        self.raw = world.run()
        self.runs.put(self.raw)

    async def write(self, **status: Any) -> None:
        kube = await Kube.connect(kubeconfig=self.world.plane.kubeconfig)
        try:
            await Writer(kube, cluster=Cluster(), runs=self.runs).write_status(self.raw, status)
        finally:
            await kube.close()

    @property
    def known(self) -> Json | None:
        return self.runs.get(key_of(self.raw))


@pytest.fixture
def looked(world: World) -> Looked:
    return Looked(world)


def test_a_status_is_written_to_a_run_that_is_as_it_was_looked_at(looked: Looked) -> None:
    asyncio.run(looked.write(summary="Running"))
    assert looked.world.status() == {"summary": "Running", **looked.world.status()}
    assert looked.known == looked.known | {"status": looked.world.status()}, "and what was written is known at once"


def test_a_status_is_not_written_over_a_newer_one(looked: Looked) -> None:
    """As a leader would that another has succeeded without its knowledge."""
    asyncio.run(looked.write(summary="Running", restarts=3))
    with pytest.raises(Retry, match="changed"):
        asyncio.run(looked.write(summary="Pending", restarts=0))
    assert (looked.world.status()["summary"], looked.world.status()["restarts"]) == ("Running", 3)
    assert looked.known is not None and looked.known["status"]["restarts"] == 3, "the next look is at what is there"


def test_a_status_is_not_written_over_an_edit_that_was_not_looked_at(looked: Looked) -> None:
    looked.world.plane.apply(make_run(looked.world.namespace, "corpus", suspend=True))
    with pytest.raises(Retry, match="changed"):
        asyncio.run(looked.write(summary="Running"))
    assert looked.world.status() == {}
    assert looked.known is not None and looked.known["spec"]["suspend"] is True


def test_a_run_that_is_gone_is_forgotten(looked: Looked) -> None:
    looked.world.plane.kubectl("-n", looked.world.namespace, "delete", "trainingrun", "demo")
    with pytest.raises(Retry, match="not found"):
        asyncio.run(looked.write(summary="Running"))
    assert looked.known is None


def test_a_run_that_took_the_name_of_another_does_not_get_its_status(looked: Looked) -> None:
    looked.world.plane.kubectl("-n", looked.world.namespace, "delete", "trainingrun", "demo")
    looked.world.plane.apply(make_run(looked.world.namespace, "corpus"))
    with pytest.raises(Retry):
        asyncio.run(looked.write(summary="Running"))
    assert looked.world.status() == {}
    assert looked.known is not None and uid_of(looked.known) == uid_of(looked.world.run()) != uid_of(looked.raw)


def in_proxy(world: World, proxy: ApiProxy, script: Callable[[Kube], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        kube = await Kube.connect(kubeconfig=world.plane.write_kubeconfig("proxied", server=proxy.url))
        try:
            await script(kube)
        finally:
            await kube.close()

    asyncio.run(main())


def test_a_replica_that_does_not_lead_any_more_sends_no_change(world: World, api_proxy: ApiProxy) -> None:
    leads = True

    async def script(kube: Kube) -> None:
        nonlocal leads
        fenced, address = kube.fenced(lambda: leads), path("ConfigMap", namespace=world.namespace)
        obj = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one", "namespace": world.namespace}}
        await fenced.request("POST", address, body=obj)
        leads = False
        with pytest.raises(NotLeading, match="no longer leads"):
            await fenced.apply(obj)
        with pytest.raises(NotLeading):
            await fenced.delete(f"{address}/one", uid="any")
        assert (await fenced.get(f"{address}/one"))["metadata"]["name"] == "one", "it may look"

    in_proxy(world, api_proxy, script)
    assert [r.method for r in api_proxy.asked] == ["POST", "GET"]
