"""The chart: what it renders and refuses, and that it contains the generated CRDs."""

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

Json = dict[str, Any]

REPO = Path(__file__).resolve().parents[2]
CHART = REPO / "charts" / "headrace"
HELM = REPO / ".cluster" / "bin" / "helm"

pytestmark = pytest.mark.skipif(not HELM.exists(), reason="needs helm; `python3 tests/cluster build` makes it")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HELM), *arguments], capture_output=True, text=True, timeout=60, check=False)


def template(**values: Any) -> subprocess.CompletedProcess[str]:
    settings = [f"--set-json={key.replace('__', '.')}={json.dumps(value)}" for key, value in values.items()]
    return helm("template", "headrace", str(CHART), "--namespace", "system", "--kube-version", "1.35.0", *settings)


def render(**values: Any) -> list[Json]:
    done = template(**values)
    assert done.returncode == 0, done.stderr
    return [obj for obj in yaml.load_all(done.stdout, Loader=Yaml12) if obj]


class Yaml12(yaml.SafeLoader):
    """Reads 1e-08 as Kubernetes does: as a number."""


Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", __import__("re").compile(r"^[0-9.]+e[-+]?[0-9]+$"), list("0123456789")
)


def only(objects: list[Json], kind: str, name: str = "headrace") -> Json:
    (found,) = [o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name)]
    return found


@cache
def defaults() -> tuple[Json, ...]:
    return tuple(render())


def test_lint_finds_nothing() -> None:
    done = helm("lint", str(CHART), "--strict", "--kube-version", "1.35.0")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["trainingruns.headrace.dev", "trainingruntimes.headrace.dev"])
def test_definitions_are_the_generated_ones_and_outlive_the_release(name: str) -> None:
    generated = yaml.load((REPO / "manifests" / "crd" / f"{name}.yaml").read_text(), Loader=Yaml12)
    rendered = only(list(defaults()), "CustomResourceDefinition", name)
    assert rendered["spec"] == generated["spec"]
    assert rendered["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "CustomResourceDefinition" not in {o["kind"] for o in render(crds__enabled=False)}


def test_the_operator_meets_the_restricted_level() -> None:
    pod = only(list(defaults()), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (
        pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    )
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"livenessProbe", "readinessProbe", "startupProbe", "resources"} <= container.keys()
    assert {"name": "PYTHONSAFEPATH", "value": "1"} in container["env"]


def test_permissions_are_exact() -> None:
    allowed = {
        (group, resource, verb)
        for rule in only(list(defaults()), "ClusterRole")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert not {a for a in allowed if "*" in a}
    assert not {a for a in allowed if a[1] in ("secrets", "roles", "rolebindings", "nodes", "pods/exec")}
    writes = {a[1] for a in allowed if a[2] not in ("get", "list", "watch")}
    assert writes == {
        "configmaps",
        "deployments",
        "deployments/finalizers",
        "events",
        "jobs",
        "jobs/finalizers",
        "serviceaccounts",
        "services",
        "tokenreviews",
        "trainingruns/finalizers",
        "trainingruns/status",
    }


def test_reports_go_to_the_replica_that_leads() -> None:
    service = only(list(defaults()), "Service")
    assert service["spec"]["selector"]["headrace.dev/leader"] == "true"
    env = {
        e["name"]: e.get("value")
        for e in only(list(defaults()), "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert env["HEADRACE_PROGRESS_URL"] == "http://headrace.system.svc:8080/v1/progress"
    assert env["HEADRACE_LEASE"] in only(list(defaults()), "Role")["rules"][1]["resourceNames"]


def test_the_pod_takes_another_python_and_more_volumes() -> None:
    rendered = render(
        command="/opt/venv/bin/python",
        image={"repository": "tests/python", "tag": "2", "pullPolicy": "Never"},
        extraVolumes=[{"name": "code", "persistentVolumeClaim": {"claimName": "code"}}],
        extraVolumeMounts=[{"name": "code", "mountPath": "/code"}],
        extraEnv=[{"name": "PATH", "value": "/code/bin"}],
    )
    pod = only(rendered, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["/opt/venv/bin/python", "-m", "headrace_operator.main"]
    assert (container["image"], container["imagePullPolicy"]) == ("tests/python:2", "Never")
    assert {"name": "code", "mountPath": "/code"} in container["volumeMounts"]
    assert {"name": "PATH", "value": "/code/bin"} in container["env"]
    assert [v["name"] for v in pod["volumes"]] == ["tmp", "code"]


def test_a_runtime_on_request() -> None:
    assert "TrainingRuntime" not in {o["kind"] for o in defaults()}
    template = {"spec": {"nodeSelector": {"pool": "h100"}}}
    runtime = only(render(runtime={"create": True, "podTemplate": template}), "TrainingRuntime", "default")
    assert runtime["spec"]["trainer"]["podTemplate"] == template
    assert "post-install" in runtime["metadata"]["annotations"]["helm.sh/hook"]


def test_more_replicas_have_a_disruption_budget() -> None:
    assert "PodDisruptionBudget" not in {o["kind"] for o in defaults()}
    assert only(render(replicas=2), "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_pod_monitors_on_request() -> None:
    monitors = [o for o in render(metrics__podMonitor__enabled=True) if o["kind"] == "PodMonitor"]
    assert [m["metadata"]["name"] for m in monitors] == ["headrace", "headrace-runs"]


def test_everybody_who_may_view_or_edit_a_namespace_may_do_so_with_runs() -> None:
    viewer, editor = (only(list(defaults()), "ClusterRole", f"headrace-{who}") for who in ("viewer", "editor"))
    assert viewer["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-view"] == "true"
    assert editor["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-edit"] == "true"
    assert {r for rule in editor["rules"] for r in rule["resources"]} == {"trainingruns"}, "runtimes are the admins'"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replicas": 0}, "replicas"),
        ({"replica": 2}, "replica"),
        ({"operator__workers": "many"}, "workers"),
        ({"operator__log__format": "xml"}, "format"),
        ({"runtime__name": "Upper"}, "name"),
        ({"extraEnv": [{"value": "nameless"}]}, "extraEnv"),
    ],
)
def test_bad_values_are_refused_by_name(values: Json, said: str) -> None:
    done = template(**values)
    assert done.returncode != 0
    assert said in done.stderr


def test_notes_hold_three_commands() -> None:
    text = (CHART / "templates" / "NOTES.txt").read_text()
    assert sum(line.startswith("  kubectl") for line in text.splitlines()) == 3
