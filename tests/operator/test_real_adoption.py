"""A new leader adopts running attempts: request counts against a real API server."""

from collections.abc import Callable
from typing import Any

import pytest

from proxies import ApiProxy
from world import World, make_run

pytestmark = pytest.mark.slow

RUNS = 12


def everything(world: World) -> dict[str, str]:
    kinds = "jobs,pods,services,configmaps,serviceaccounts,trainingruns"
    found = world.plane.get("-n", world.namespace, kinds)["items"]
    return {f"{o['kind']}/{o['metadata']['name']}": o["metadata"]["resourceVersion"] for o in found}


def reconciled(metrics: str) -> float:
    name = "headrace_operator_reconcile_duration_seconds_count"
    return next((float(line.split()[1]) for line in metrics.splitlines() if line.startswith(name)), 0.0)


@pytest.fixture
def started(world: World, operator: Any) -> World:
    """Runs whose pods wait, and half of which have pods that run."""
    for i in range(RUNS):
        run = make_run(world.namespace, "corpus")
        world.plane.apply({**run, "metadata": {**run["metadata"], "name": f"run-{i}"}})
    world.eventually(lambda: len(world.objects("pods", "headrace.dev/run")) == RUNS)
    for pod in world.objects("pods", "headrace.dev/run")[::2]:
        world.run_pod(pod)
    world.eventually(lambda: world.objects("configmaps", "headrace.dev/run")[RUNS - 1])
    world.eventually(
        lambda: sum(job["status"].get("ready", 0) for job in world.objects("jobs", "headrace.dev/run")) == RUNS // 2
    )
    return world


def test_a_new_leader_asks_at_most_one_question_a_run_and_changes_nothing(
    started: World, operator: Any, api_proxy: ApiProxy, operators: Callable[..., Any]
) -> None:
    settled: dict[str, str] = {}

    def is_settled() -> bool:
        before, now = dict(settled), everything(started)
        settled.clear()
        settled.update(now)
        return before == now

    started.eventually(is_settled)
    assert operator.stop() == 0
    second = operators("adopting", server=api_proxy.url)
    started.eventually(lambda: reconciled(second.metrics()) >= RUNS)
    namespaced = [(r.method, r.path) for r in api_proxy.asked if f"/namespaces/{started.namespace}/" in r.path]
    assert {method for method, _ in namespaced} == {"GET"}
    assert len(namespaced) == len(set(namespaced)) == RUNS - RUNS // 2, "none for those whose pods run"
    assert everything(started) == settled


def test_an_attempt_of_which_something_is_missing_is_made_whole(
    started: World, operator: Any, operators: Callable[..., Any]
) -> None:
    """As after a leader that was killed before it had made everything."""
    pods = started.objects("pods", "headrace.dev/run")
    name = next(p["metadata"]["ownerReferences"][0]["name"] for p in pods if p["status"]["phase"] == "Pending")
    operator.stop(gracefully=False)
    started.plane.kubectl("-n", started.namespace, "delete", f"configmap/{name}", f"service/{name}")
    operators("completing")
    started.eventually(lambda: {name} <= {*started.all_names("configmaps")} & {*started.all_names("services")})
