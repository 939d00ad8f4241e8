"""Leader election with a Lease on a real API server: never two leaders, and soon one again."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web

from headrace_operator.body.kube import Kube
from headrace_operator.leader import Leadership, LeaseSettings
from proxies import ApiProxy, always
from world import Json, World

pytestmark = pytest.mark.slow

DURATION, GIVE_UP = 4.0, 2.8


class StoppedClock:
    """Time that passes only when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Election:
    """Replicas that want one Lease; each reaches the API server by way of the proxy."""

    world: World
    proxy: ApiProxy
    reigns: list[tuple[str, float, float]] = field(default_factory=list)
    """Who led, from when to when."""

    async def connect(self) -> None:
        self.kube = await Kube.connect(kubeconfig=self.world.plane.write_kubeconfig("proxied", server=self.proxy.url))

    def replica(self, name: str, **fields: Any) -> Leadership:
        times = {"duration_seconds": DURATION, "give_up_seconds": GIVE_UP, "retry_seconds": 0.4, "request_seconds": 1.0}
        clock = {"clock": fields.pop("clock")} if "clock" in fields else {}
        settings = LeaseSettings(namespace=self.world.namespace, name="test", identity=name, **{**times, **fields})
        return Leadership(self.kube, settings, **clock)

    async def serve(self, name: str) -> None:
        """Lead whenever that is possible, and note when one acts."""
        leadership, loop = self.replica(name), asyncio.get_running_loop()
        while True:
            await leadership.acquire()
            began = loop.time()
            self.reigns.append((name, began, began))
            holding = asyncio.create_task(leadership.hold())
            try:
                while leadership.leads():
                    self.reigns[-1] = (name, began, loop.time())
                    await asyncio.sleep(0.01)
            finally:
                holding.cancel()

    def kubectl(self, *words: str) -> Callable[[], Any]:
        return lambda: self.world.plane.kubectl("-n", self.world.namespace, *words)

    async def delete(self) -> None:
        await asyncio.to_thread(self.kubectl("delete", "lease", "test"))

    async def patch(self, **spec: Any) -> None:
        patch = ["patch", "lease", "test", "--type=merge", "-p", json.dumps({"spec": spec})]
        await asyncio.to_thread(self.kubectl(*patch))

    def lease(self) -> Json:
        return dict(self.world.plane.get("-n", self.world.namespace, "lease", "test"))


@pytest.fixture
def election(world: World, api_proxy: ApiProxy) -> Election:
    return Election(world, api_proxy)


def run(election: Election, script: Callable[[], Any], *names: str) -> None:
    """Play a script while replicas serve."""

    async def main() -> None:
        await election.connect()
        serving = [asyncio.create_task(election.serve(name)) for name in names]
        try:
            async with asyncio.timeout(240):
                await script()
        finally:
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)
            await election.kube.close()

    asyncio.run(main())


def overlaps(reigns: list[tuple[str, float, float]]) -> list[Any]:
    ordered = sorted(reigns, key=lambda reign: reign[1])
    return [(one, other) for one, other in pairwise(ordered) if one[0] != other[0] and other[1] < one[2]]


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.02)


def test_of_several_that_start_at_once_one_leads(election: Election) -> None:
    async def script() -> None:
        await until(lambda: bool(election.reigns))
        await asyncio.sleep(2 * DURATION)
        assert overlaps(election.reigns) == []

    run(election, script, "a", "b", "c")


def test_a_lease_that_is_deleted_never_makes_two_leaders(election: Election) -> None:
    async def script() -> None:
        await until(lambda: bool(election.reigns))
        for _ in range(8):
            await election.delete()
            await asyncio.sleep(0.5)
        await asyncio.sleep(DURATION)
        assert overlaps(election.reigns) == []

    run(election, script, "a", "b", "c")
    assert election.lease()["spec"]["holderIdentity"] == election.reigns[-1][0], "it has made the Lease again"


def test_one_that_loses_the_lease_stops_before_another_leads_and_may_lead_again(election: Election) -> None:
    async def script() -> None:
        await until(lambda: bool(election.reigns))
        before = len(election.reigns)
        await election.patch(holderIdentity="stranger", leaseDurationSeconds=6)
        patched = asyncio.get_running_loop().time()
        await until(lambda: len(election.reigns) > before)
        assert election.reigns[before - 1][2] < patched + 3 < election.reigns[before][1]
        assert overlaps(election.reigns) == []

    run(election, script, "a", "b")


def test_a_leader_that_is_cut_off_stops_before_another_can_lead(election: Election) -> None:
    async def script() -> None:
        await until(lambda: bool(election.reigns))
        leader = election.reigns[0][0]

        async def cut_off(request: web.Request) -> web.StreamResponse | None:
            theirs = request.method == "PUT" and (await request.json())["spec"]["holderIdentity"] == leader
            return web.Response(status=503) if theirs else None

        election.proxy.faults.append(cut_off)
        await until(lambda: len(election.reigns) > 1)
        assert election.reigns[1][0] != leader
        assert overlaps(election.reigns) == []

    run(election, script, "a", "b")


@pytest.mark.parametrize(
    "fault",
    [always(503), always(200, "[]"), always(200, "<html>"), always(200, "{}"), always(200, '{"spec": null}')],
    ids=["unavailable", "a list", "a page", "nothing in it", "no spec"],
)
def test_whatever_the_answer_is_it_is_no_win(election: Election, fault: Any) -> None:
    async def script() -> None:
        election.proxy.faults.append(fault)
        leadership = election.replica("a")
        acquiring = asyncio.create_task(leadership.acquire())
        await until(lambda: election.proxy.count("GET", "leases") > 6)
        assert not acquiring.done() and not leadership.leads()
        election.proxy.faults.clear()
        await acquiring
        assert leadership.leads()

    run(election, script)


def test_making_the_lease_when_another_was_faster_is_no_win(election: Election) -> None:
    async def script() -> None:
        slow = election.replica("slow", request_seconds=30)

        async def be_faster(request: web.Request) -> None:
            if request.method == "POST" and b"slow" in await request.read():
                election.proxy.faults.clear()
                spec = {"holderIdentity": "fast", "leaseDurationSeconds": 60}
                meta = {"name": "test", "namespace": election.world.namespace}
                lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}
                await asyncio.to_thread(election.world.plane.apply, lease)

        election.proxy.faults.append(be_faster)
        acquiring = asyncio.create_task(slow.acquire())
        await until(lambda: election.proxy.count("POST", "leases") > 0)
        looks = election.proxy.count("GET", "leases")
        await until(lambda: election.proxy.count("GET", "leases") > looks + 4)
        assert not acquiring.done() and not slow.leads()
        acquiring.cancel()

    run(election, script)


def test_one_that_slept_for_too_long_may_not_act_even_before_it_looks(election: Election) -> None:
    async def script() -> None:
        clock = StoppedClock()
        leadership = election.replica("a", clock=clock)
        acquiring = asyncio.create_task(leadership.acquire())
        await until(lambda: election.proxy.count("GET", "leases") > 1)
        clock.now = DURATION + 0.1  # nobody had the Lease for so long
        await acquiring
        assert leadership.leads()
        clock.now += GIVE_UP - 0.01
        assert leadership.leads()
        clock.now += 0.02
        assert not leadership.leads()

    run(election, script)


def test_the_next_leads_within_15_seconds_by_the_times_that_are_the_default() -> None:
    """Seen at the latest after one look, taken once it was unchanged for its duration; the rest is for requests."""
    times = LeaseSettings(namespace="n", name="l", identity="i")
    assert times.retry_seconds + times.duration_seconds + times.request_seconds < 15
    assert times.give_up_seconds + times.request_seconds < times.duration_seconds
    assert 2 * times.request_seconds + times.retry_seconds <= times.give_up_seconds
