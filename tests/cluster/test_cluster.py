"""What the other cluster tests rely on: two nodes, DNS, restricted pods that run torch, logs, signals, S3 and tokens."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster import leftovers
from cluster.fixtures import Cluster, give_up
from cluster.hostpython import PodPython
from cluster.programs import all_reduce

pytestmark = pytest.mark.timeout(180, func_only=True)  # not the fixture: it may have to build the cluster first

AUDIENCE = "headrace-test"


def pod(name: str, namespace: str, spec: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, **metadata},
        "spec": spec,
    }


def headless_service(name: str, namespace: str, selector: dict[str, str]) -> dict[str, Any]:
    """Gives pods names before they are ready: a rendezvous needs them."""
    spec = {"clusterIP": "None", "selector": selector, "publishNotReadyAddresses": True}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def indexed_job(name: str, namespace: str, pods: int, spec: dict[str, Any]) -> dict[str, Any]:
    """A gang of pods, each on a node of its own."""
    selector = {"matchLabels": {"job-name": name}}
    apart = {"topologyKey": "kubernetes.io/hostname", "labelSelector": selector}
    spec["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    job = {
        "completions": pods,
        "parallelism": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"metadata": {}, "spec": {**spec, "subdomain": name}},
    }
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job}


def test_two_nodes_are_ready(cluster: Cluster) -> None:
    assert len(cluster.nodes) >= 2
    assert [ready_status(cluster, node) for node in cluster.nodes] == ["True"] * len(cluster.nodes)


def test_a_pod_answers_on_its_dns_name_on_another_node(cluster: Cluster, namespace: str, python: PodPython) -> None:
    server = python.container("server", [python.python, "-m", "http.server", "8000", "--directory", "/tmp"])
    spec = python.pod_spec(server, nodeName=cluster.nodes[0], hostname="server", subdomain="web")
    name = f"server.web.{namespace}.svc.cluster.local"
    client = python.container("client", [python.python, "-c", FETCH_UNTIL_ANSWERED, f"http://{name}:8000/"])
    cluster.apply(
        headless_service("web", namespace, {"app": "web"}),
        pod("server", namespace, spec, labels={"app": "web"}),
        pod("client", namespace, python.pod_spec(client, nodeName=cluster.nodes[1])),
    )
    cluster.wait_for_pod(namespace, "client")
    assert "status 200" in cluster.kubectl("logs", "client", "-n", namespace)


FETCH_UNTIL_ANSWERED = """
import sys, time, urllib.request
deadline = time.monotonic() + 30
while True:
    try:
        print("status", urllib.request.urlopen(sys.argv[1], timeout=2).status)
        break
    except OSError as error:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.5)
"""


def test_restricted_refuses_hostpath_but_takes_claims_on_it(
    cluster: Cluster, namespace: str, python: PodPython
) -> None:
    spec = python.pod_spec(python.container("main", ["true"]), volumes=[{"name": "etc", "hostPath": {"path": "/etc"}}])
    with pytest.raises(AssertionError, match="violates PodSecurity"):
        cluster.apply(pod("refused", namespace, spec))

    probe = "import os, torch; print(os.getuid(), torch.ones(2).sum().item())"
    cluster.apply(pod("taken", namespace, python.pod_spec(python.container("main", [python.python, "-c", probe]))))
    cluster.wait_for_pod(namespace, "taken")
    assert cluster.kubectl("logs", "taken", "-n", namespace).strip() == "65532 2.0"


@pytest.mark.own_cluster
def test_mounted_sources_cannot_be_written(cluster: Cluster, namespace: str, python: PodPython) -> None:
    touch = [f"touch {path}/written && echo written to {path}" for path in python.paths]
    script = "; ".join([*touch, "id -u"])
    cluster.apply(pod("writer", namespace, python.pod_spec(python.container("main", ["/bin/sh", "-c", script]))))
    cluster.wait_for_pod(namespace, "writer")
    log = cluster.kubectl("logs", "writer", "-n", namespace)
    assert "written to" not in log
    assert log.count("Read-only file system") + log.count("Permission denied") == len(python.paths)


def test_a_gang_on_two_nodes_reduces_over_four_ranks(cluster: Cluster, namespace: str, python: PodPython) -> None:
    torchrun = [
        *(python.python, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=gang-0.gang.{namespace}.svc.cluster.local:29500", "--rdzv-id=gang"),
        "/programs/all_reduce.py",
    ]
    program = {"name": "program", "configMap": {"name": "program"}}
    one_thread = {"name": "OMP_NUM_THREADS", "value": "1"}
    container = python.container(
        "main", torchrun, env=[one_thread], volumeMounts=[{"name": "program", "mountPath": "/programs"}]
    )
    spec = python.pod_spec(container, volumes=[program])
    source = {"all_reduce.py": inspect.getsource(all_reduce)}
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "program", "namespace": namespace},
            "data": source,
        },
        headless_service("gang", namespace, {"job-name": "gang"}),
        indexed_job("gang", namespace, 2, spec),
    )
    cluster.wait(lambda: job_ended(cluster, namespace, "gang"), "the gang's end", timeout_seconds=160)
    pods = cluster.get("pods", "-n", namespace, "-l", "job-name=gang")["items"]
    logs = "".join(cluster.kubectl("logs", item["metadata"]["name"], "-n", namespace) for item in pods)
    assert {item["spec"]["nodeName"] for item in pods} == set(cluster.nodes[:2])
    assert sorted(re.findall(r"rank (\d) of 4 on \S+: sum 10\b", logs)) == ["0", "1", "2", "3"], logs


def job_ended(cluster: Cluster, namespace: str, name: str) -> bool:
    status = cluster.get("job", name, "-n", namespace)["status"]
    return any(condition["type"] in ("Complete", "Failed") for condition in status.get("conditions", []))


def test_deleting_a_pod_sends_sigterm_and_waits_for_its_grace(
    cluster: Cluster, namespace: str, python: PodPython
) -> None:
    container = python.container("main", [python.python, "-c", SAVE_ON_SIGTERM])
    spec = python.pod_spec(container, terminationGracePeriodSeconds=20)
    # The finalizer keeps the object after the pod's end, so that its exit code can be read.
    cluster.apply(pod("stopping", namespace, spec, finalizers=["headrace.test/keep"]))
    cluster.wait_for_pod(namespace, "stopping", phase="Running")
    cluster.wait(lambda: "running" in cluster.kubectl("logs", "stopping", "-n", namespace), "the pod's first line")

    cluster.kubectl("delete", "pod", "stopping", "-n", namespace, "--wait=false")
    cluster.wait(lambda: bool(terminated(cluster, namespace, "stopping")), "the pod's end", timeout_seconds=30)
    end = terminated(cluster, namespace, "stopping")
    cluster.kubectl(
        "patch", "pod", "stopping", "-n", namespace, "--type=merge", "-p", '{"metadata": {"finalizers": null}}'
    )
    assert (end["exitCode"], end["message"]) == (75, "saved after signal 15")


SAVE_ON_SIGTERM = """
import pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(2)
    pathlib.Path("/dev/termination-log").write_text(f"saved after signal {number}")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("running", flush=True)
while True:
    signal.pause()
"""


def terminated(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    """How the container ended; empty while it runs."""
    status = cluster.get("pod", name, "-n", namespace)["status"]["containerStatuses"][0]
    return dict(status["state"].get("terminated", {}))


def test_a_pod_and_the_host_share_s3(cluster: Cluster, namespace: str, python: PodPython) -> None:
    if cluster.s3 is None:
        give_up("set HEADRACE_TEST_S3_ENDPOINT, _ACCESS_KEY and _SECRET_KEY to an S3 service that pods reach")
    bucket = namespace
    env = [{"name": key, "value": value} for key, value in {**cluster.s3.env, "BUCKET": bucket}.items()]
    cluster.apply(
        pod("s3", namespace, python.pod_spec(python.container("main", [python.python, "-c", PUT_AND_GET], env=env)))
    )
    cluster.wait_for_pod(namespace, "s3")
    assert cluster.kubectl("logs", "s3", "-n", namespace) == "hello\n"

    client = cluster.s3.client()
    assert client.get_object(Bucket=bucket, Key="greeting")["Body"].read() == b"hello"
    client.delete_object(Bucket=bucket, Key="greeting")
    client.delete_bucket(Bucket=bucket)


PUT_AND_GET = """
import os, boto3
client, bucket = boto3.client("s3"), os.environ["BUCKET"]
client.create_bucket(Bucket=bucket)
client.put_object(Bucket=bucket, Key="greeting", Body=b"hello")
print(client.get_object(Bucket=bucket, Key="greeting")["Body"].read().decode())
"""


def test_a_projected_token_is_good_for_its_audience_only(cluster: Cluster, namespace: str, python: PodPython) -> None:
    source = {"serviceAccountToken": {"audience": AUDIENCE, "path": "token", "expirationSeconds": 600}}
    token_volume = {"name": "token", "projected": {"sources": [source]}}
    mount = {"name": "token", "mountPath": "/var/run/headrace", "readOnly": True}
    container = python.container(
        "main", ["/bin/sh", "-c", "cat /var/run/headrace/token; echo; sleep 60"], volumeMounts=[mount]
    )
    spec = python.pod_spec(container, volumes=[token_volume], terminationGracePeriodSeconds=0)
    cluster.apply(pod("reporter", namespace, spec))
    cluster.wait_for_pod(namespace, "reporter", phase="Running")
    cluster.wait(lambda: bool(cluster.kubectl("logs", "reporter", "-n", namespace)), "the token in the log")
    token = cluster.kubectl("logs", "reporter", "-n", namespace).strip()

    review = review_token(cluster, token, AUDIENCE)
    assert review["authenticated"] and review["audiences"] == [AUDIENCE]
    assert review["user"]["username"] == f"system:serviceaccount:{namespace}:default"
    assert review["user"]["extra"]["authentication.kubernetes.io/pod-name"] == ["reporter"]
    assert not review_token(cluster, token, "somebody-else").get("authenticated")


def review_token(cluster: Cluster, token: str, audience: str) -> dict[str, Any]:
    spec = {"token": token, "audiences": [audience]}
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
    return dict(json.loads(cluster.kubectl("create", "-f", "-", "-o", "json", stdin=json.dumps(review)))["status"])


def test_helm_installs_a_deployment_that_runs_this_python(
    cluster: Cluster, namespace: str, python: PodPython, tmp_path: Path
) -> None:
    write_chart(tmp_path / "chart")
    command = [
        python.python,
        "-c",
        "import time, headrace_trainer, torch; print('serving', flush=True); time.sleep(600)",
    ]
    container = python.container("server", command)
    values = {"spec": python.pod_spec(container, restartPolicy="Always", terminationGracePeriodSeconds=0)}
    (tmp_path / "values.json").write_text(json.dumps(values))

    release = ["demo", str(tmp_path / "chart"), "-n", namespace, "-f", str(tmp_path / "values.json")]
    cluster.helm("install", *release, "--wait", "--timeout=90s")
    cluster.wait(lambda: "serving" in cluster.kubectl("logs", "deployment/demo", "-n", namespace), "the server's line")
    cluster.helm("uninstall", "demo", "-n", namespace)


def write_chart(folder: Path) -> None:
    """A chart of one Deployment whose pod comes from the values."""
    (folder / "templates").mkdir(parents=True)
    (folder / "Chart.yaml").write_text("apiVersion: v2\nname: demo\nversion: 0.1.0\n")
    labels = {"app": "demo"}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "demo"},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": "SPEC"}},
    }
    template = json.dumps(deployment).replace('"SPEC"', "{{ .Values.spec | toJson }}")
    (folder / "templates/deployment.yaml").write_text(template)


@pytest.mark.slow
@pytest.mark.own_cluster
def test_a_node_without_power_is_noticed_and_returns(cluster: Cluster) -> None:
    node = cluster.nodes[1]
    cluster.fail_node(node)
    try:
        cluster.wait(lambda: ready_status(cluster, node) == "Unknown", f"{node} to be missed", timeout_seconds=60)
    finally:
        cluster.heal()
    assert ready_status(cluster, node) == "True"


def ready_status(cluster: Cluster, node: str) -> str:
    conditions = cluster.get("node", node)["status"]["conditions"]
    return next(str(condition["status"]) for condition in conditions if condition["type"] == "Ready")


@pytest.mark.own_cluster
def test_the_leftover_check_sees_a_running_cluster(cluster: Cluster) -> None:
    """`down` trusts this check; while the cluster is up it must find all of it."""
    found = leftovers.find()
    for kind in ("new control group", "new interface: headrace0", "new path", "new route", "process"):
        assert any(line.startswith(kind) for line in found), f"{kind}: not in {found}"
