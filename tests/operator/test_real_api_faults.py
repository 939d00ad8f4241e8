"""Operator processes while the API server or the network fails: they survive, act once, and recover quickly.

Times are printed; they are bounded here by what a busy machine may take, not by what is promised.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from proxies import ApiProxy, TcpProxy, always, started
from world import World, make_run

pytestmark = pytest.mark.slow

BURST = 40


@pytest.fixture
def tcp_proxy(control_plane: Any) -> Iterator[TcpProxy]:
    with started(TcpProxy(control_plane.port)) as proxy:
        yield proxy


def took(what: str, holds: Callable[[], Any], eventually: Callable[..., Any]) -> float:
    began = time.monotonic()
    eventually(holds, timeout_seconds=180)
    seconds = time.monotonic() - began
    print(f"{what}: {seconds:.1f} s")
    return seconds


def named(world: World, name: str, **spec: Any) -> dict[str, Any]:
    run = make_run(world.namespace, "corpus", **spec)
    return {**run, "metadata": {**run["metadata"], "name": name}}


def jobs(world: World) -> set[str]:
    found = world.plane.get("-n", world.namespace, "jobs", "-l", "headrace.dev/run")["items"]
    return {str(job["metadata"]["labels"]["headrace.dev/run"]) for job in found}


def owner(world: World) -> list[str]:
    found = world.plane.get("-n", world.namespace, "jobs", "-l", "headrace.dev/run")["items"]
    return [str(job["metadata"]["ownerReferences"][0]["uid"]) for job in found]


def test_a_run_that_is_replaced_by_force_is_not_forgotten(world: World, operator: Any) -> None:
    """The old one's change and end and the new one come in one read."""
    world.plane.apply(make_run(world.namespace, "corpus"))
    world.eventually(lambda: jobs(world) == {"demo"})
    operator.signal(signal.SIGSTOP)
    world.plane.kubectl("-n", world.namespace, "annotate", "trainingrun", "demo", "changed=yes")
    world.plane.kubectl("replace", "--force", "-f", "-", stdin=json.dumps(make_run(world.namespace, "corpus")))
    operator.signal(signal.SIGCONT)
    world.eventually(lambda: owner(world) == [world.run()["metadata"]["uid"]])
    world.eventually(lambda: world.status().get("stage") == "corpus")


def test_a_server_that_is_not_ready_at_the_start_is_waited_for(
    world: World, api_proxy: ApiProxy, operators: Any
) -> None:
    api_proxy.faults.append(always(503))
    operator = operators("early", server=api_proxy.url)
    world.eventually(lambda: len(api_proxy.asked) > 20)
    time.sleep(5)
    assert operator.lives() and not operator.leads()
    api_proxy.faults.clear()
    world.eventually(operator.leads)
    world.plane.apply(make_run(world.namespace, "corpus"))
    world.eventually(lambda: jobs(world) == {"demo"})


def test_an_error_of_kopfs_watch_leaves_the_operator_alive_and_its_signals_its_own(
    world: World, api_proxy: ApiProxy, operators: Any
) -> None:
    operator = operators("kopf", server=api_proxy.url)
    world.eventually(operator.leads)
    error = {"type": "ERROR", "object": {"kind": "Status", "code": 500, "reason": "InternalError", "message": "etcd"}}
    odd = [error, error]
    api_proxy.streamed = lambda r, event: [odd.pop()] if odd and "trainingruns" in r.path else [event]
    for name in ("one", "two", "three"):
        world.plane.apply(named(world, name))
    world.eventually(lambda: jobs(world) == {"one", "two", "three"})
    assert not odd
    assert operator.stop() == 0


def test_while_the_api_server_is_down_the_operator_lives_and_then_acts_on_everything(
    world: World, control_plane: Any, operator: Any, eventually: Callable[..., Any]
) -> None:
    world.plane.apply(named(world, "before"))
    eventually(lambda: jobs(world) == {"before"})
    names = {f"burst-{i}" for i in range(BURST)}
    operator.signal(signal.SIGSTOP)
    world.plane.apply(*(named(world, name) for name in names))
    operator.signal(signal.SIGCONT)  # what comes to it now is worked on while the server goes
    control_plane.kill_api_server()
    try:
        down = time.monotonic()
        took("stopped leading after", lambda: not operator.leads(), eventually)
        time.sleep(max(0.0, 30 - (time.monotonic() - down)))
        assert operator.lives()
    finally:
        control_plane.start_api_server()
    took("led again after", operator.leads, eventually)
    took(f"all {BURST} runs acted on after", lambda: jobs(world) >= names, eventually)
    assert operator.lives()
    assert len(owner(world)) == BURST + 1, "each has one Job"
    eventually(lambda: len(world.objects("pods", "headrace.dev/run")) == BURST + 1, timeout_seconds=180)


def test_connections_that_go_silent_are_noticed_though_new_ones_work(
    world: World, tcp_proxy: TcpProxy, operators: Any, eventually: Callable[..., Any]
) -> None:
    operator = operators("silent", server=tcp_proxy.url)
    eventually(operator.leads)
    world.plane.apply(named(world, "before"))
    eventually(lambda: jobs(world) == {"before"})
    assert tcp_proxy.silence() >= 5, "the watches are among them"
    world.plane.apply(named(world, "after"))
    took("noticed after", lambda: "after" in jobs(world), eventually)
    assert operator.lives() and operator.leads()


def test_when_the_leader_is_killed_the_next_one_leads(
    world: World, operators: Any, operator: Any, eventually: Callable[..., Any]
) -> None:
    second = operators("second")
    eventually(second.metrics)
    assert not second.leads()
    operator.stop(gracefully=False)
    took("the next leads after", second.leads, eventually)
    world.plane.apply(make_run(world.namespace, "corpus"))
    eventually(lambda: jobs(world) == {"demo"})


def test_a_leader_that_slept_changes_nothing_and_waits_like_the_others(
    world: World, api_proxy: ApiProxy, operators: Any, eventually: Callable[..., Any]
) -> None:
    first = operators("first", server=api_proxy.url)
    eventually(first.leads)
    world.plane.apply(named(world, "kept"))
    eventually(lambda: jobs(world) == {"kept"})
    second = operators("second")
    eventually(second.metrics)
    first.signal(signal.SIGSTOP)
    eventually(second.leads)
    world.plane.apply(named(world, "kept", suspend=True), named(world, "made"))
    eventually(lambda: jobs(world) == {"made"})
    before = len(api_proxy.asked)
    first.signal(signal.SIGCONT)
    eventually(lambda: len(api_proxy.asked) > before + 10)
    time.sleep(5)
    changes = [(r.method, r.path) for r in api_proxy.asked[before:] if r.method != "GET"]
    assert changes == []
    assert first.lives() and not first.leads() and second.leads()
    assert jobs(world) == {"made"}
    second.stop()
    eventually(first.leads)
    world.plane.apply(named(world, "later"))
    eventually(lambda: jobs(world) == {"made", "later"})


def test_a_leader_whose_lease_was_taken_waits_for_it_and_acts_again(world: World, operator: Any) -> None:
    spec = {"holderIdentity": "somebody-else", "leaseDurationSeconds": 5}
    patch = ["patch", "lease", "headrace", "--type=merge", "-p", json.dumps({"spec": spec})]
    world.plane.kubectl("-n", "headrace-system", *patch)
    world.eventually(lambda: not operator.leads())
    world.plane.apply(make_run(world.namespace, "corpus"))
    time.sleep(1)
    assert jobs(world) == set() and operator.lives()
    world.eventually(operator.leads)
    world.eventually(lambda: jobs(world) == {"demo"})
    assert operator.stop() == 0
