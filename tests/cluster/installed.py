"""Headrace on the test cluster: the chart installed in a namespace of its own, and a namespace for runs with S3.

`operator` and `runs` are fixtures of a session of runs; `make_manifest` and `Runs` are what the tests speak through.
"""

import copy
import json
import os
import pydoc_data.topics
import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.fixtures import RESTRICTED, S3, Cluster, give_up, prepare_python, python_of
from cluster.hostpython import volumes_delete_command
from workplace import STAGES

CHART = Path(__file__).resolve().parents[2] / "charts/headrace"
SYSTEM = "headrace-system"
SECRET = "s3"


@dataclass(frozen=True)
class Operator:
    """The installed operator."""

    cluster: Cluster

    def pod(self) -> dict[str, Any]:
        """Its newest pod that is not on its way out."""
        pods = self.cluster.get("pods", "-n", SYSTEM, "-l", "app.kubernetes.io/name=headrace")["items"]
        living = [p for p in pods if "deletionTimestamp" not in p["metadata"]]
        return max(living, key=lambda p: p["metadata"]["creationTimestamp"])

    def restarts(self) -> int:
        """How often its container was started again."""
        return sum(s["restartCount"] for s in self.pod()["status"].get("containerStatuses", []))

    def kill(self) -> None:
        """End the operator's process with SIGKILL, from outside of its container."""
        if not self.cluster.own:
            name = self.pod()["metadata"]["name"]
            self.cluster.kubectl("delete", "pod", name, "-n", SYSTEM, "--grace-period=0", "--force")
            return
        found = [p for p in psutil.process_iter() if "headrace_operator.main" in _words(p) and _namespaced(p)]
        assert found, "the operator's process was not found"
        for process in found:
            os.kill(process.pid, signal.SIGKILL)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _namespaced(process: psutil.Process) -> bool:
    """Whether a process is in a container: its pid namespace is not this one's."""
    return Path(f"/proc/{process.pid}/ns/pid").readlink() != Path("/proc/self/ns/pid").readlink()


@dataclass(frozen=True)
class Runs:
    """A namespace that enforces `restricted`, with a bucket that holds real text."""

    cluster: Cluster
    namespace: str
    s3: S3
    bucket: str

    def manifest(self, name: str, *stages: str, **spec: Any) -> dict[str, Any]:
        """A small run; a stage's name may have a suffix, as in `base-deleted`."""
        named = [{"name": s, **copy.deepcopy(STAGES[s.partition("-")[0]])} for s in stages]
        for stage in named:
            _scale(stage, raw=f"s3://{self.bucket}/raw")
        storage = {
            "uri": f"s3://{self.bucket}/store",
            "endpoint": self.s3.endpoint,
            "region": self.s3.region,
            "secretRef": {"name": SECRET},
        }
        return {
            "apiVersion": "headrace.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {"storage": storage, "restartPolicy": {"maxInfraRestarts": 3}, **spec, "stages": named},
        }

    def get(self, name: str) -> dict[str, Any]:
        """The run's object."""
        return self.cluster.get("trun", name, "-n", self.namespace)

    def stage(self, run: str, name: str) -> dict[str, Any]:
        """One stage of a run's status; empty before there is one."""
        stages = self.get(run).get("status", {}).get("stages", [])
        return next((s for s in stages if s["name"] == name), {})

    def step(self, run: str, stage: str) -> int:
        """The step that a running stage has reported; -1 while another runs."""
        status = self.get(run).get("status", {})
        return int(status.get("step", "0").split("/")[0]) if status.get("stage") == stage else -1

    def pods(self, run: str, stage: str) -> list[dict[str, Any]]:
        """The pods of a stage."""
        labels = f"headrace.dev/run={run},headrace.dev/stage={stage}"
        return list(self.cluster.get("pods", "-n", self.namespace, "-l", labels)["items"])

    def wait_complete(self, name: str, *, seconds: int = 420) -> None:
        """Wait for the end, then `kubectl wait` as users do; a failure shows the run and the operator's last words."""
        try:
            self.cluster.wait(lambda: self._ended(name), f"{name} to end", timeout_seconds=seconds)
            condition = ["--for=condition=Complete", f"trun/{name}", "-n", self.namespace, "--timeout=5s"]
            self.cluster.kubectl("wait", *condition)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.explain(name)}") from error

    def _ended(self, name: str) -> bool:
        return self.get(name).get("status", {}).get("summary") in ("Complete", "Failed")

    def explain(self, name: str) -> str:
        """Everything that tells why a run is where it is."""
        status = json.dumps(self.get(name).get("status", {}), indent=1)
        pods = self.cluster.kubectl("get", "pods,jobs,events", "-n", self.namespace)
        operator = self.cluster.kubectl("logs", "deployment/headrace", "-n", SYSTEM, "--tail=40")
        return "\n".join([status, pods, operator])

    def losses(self, stage: str) -> list[str]:
        """The loss of every step of a finished training stage, bit for bit, read from storage."""
        body = self.s3.client().get_object(Bucket=self.bucket, Key=f"store/{stage}/history.jsonl")["Body"].read()
        return [json.loads(line)["loss_hex"] for line in body.decode().splitlines()]


def _scale(stage: dict[str, Any], *, raw: str) -> None:
    """Turn a stage of the local tier into the cluster's: text from S3, and four ranks in two pods on two nodes."""
    if "corpus" in stage:
        stage["corpus"]["sources"] = [{"uri": raw}]
    if "pretrain" in stage:
        stage["compute"] = {"nodes": 2, "ranksPerNode": 2}
        stage["pretrain"]["parallelism"] = {"tensor": 2, "pipeline": 2}


@pytest.fixture(scope="module")
def operator(cluster: Cluster) -> Iterator[Operator]:
    """The chart, installed by helm into a namespace that enforces `restricted`."""
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM, "labels": RESTRICTED}})
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"headrace-values-{os.getpid()}.json"
    path.write_text(json.dumps(chart_values(cluster)))
    try:
        cluster.helm(
            "upgrade", "--install", "headrace", str(CHART), "-n", SYSTEM, "-f", str(path), "--wait", "--timeout=150s"
        )
    finally:
        path.unlink()
    yield Operator(cluster)
    cluster.helm("uninstall", "headrace", "-n", SYSTEM)
    cluster.kubectl("delete", "namespace", SYSTEM, "--wait=false")


def chart_values(cluster: Cluster) -> dict[str, Any]:
    """What the chart is told: the operator's image, and how trainers find their Python."""
    repository, _, tag = cluster.operator_image.rpartition(":")
    python = python_of(cluster, namespace="")
    container = {"name": "trainer", "volumeMounts": python.volume_mounts, "env": python.env}
    return {
        "image": {"repository": repository, "tag": tag, "pullPolicy": python.image_pull_policy},
        "operator": {"log": {"format": "text"}},
        "runtime": {
            "create": True,
            "image": cluster.trainer_image,
            "imagePullPolicy": python.image_pull_policy,
            "python": python.python,
            "podTemplate": {"spec": {"volumes": python.volumes, "containers": [container]}},
        },
    }


@pytest.fixture(scope="module")
def runs(cluster: Cluster, operator: Operator) -> Iterator[Runs]:
    """A namespace for runs, and a bucket with Python's language reference, topic by topic."""
    if cluster.s3 is None:
        give_up("set HEADRACE_TEST_S3_ENDPOINT, _ACCESS_KEY and _SECRET_KEY to an S3 service that pods reach")
    s3, name = cluster.s3, f"runs-{uuid.uuid4().hex[:8]}"
    client = s3.client()
    client.create_bucket(Bucket=name)
    for topic, text in pydoc_data.topics.topics.items():
        client.put_object(Bucket=name, Key=f"raw/{topic.replace('/', '-')}.txt", Body=text.encode())
    cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}},
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": SECRET, "namespace": name},
            "stringData": {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key},
        },
    )
    prepare_python(cluster, name)
    yield Runs(cluster=cluster, namespace=name, s3=s3, bucket=name)
    cluster.kubectl("delete", "namespace", name, "--wait=false")
    if cluster.own:
        cluster.kubectl(*volumes_delete_command(name))
