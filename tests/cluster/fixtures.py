"""The fixtures of tests that need a cluster: `cluster` for the session, `namespace` for one test.

conftest.py loads them for this folder; another folder of tests loads them with `pytest_plugins = ["cluster.fixtures"]`.
"""

import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import boto3
import pytest

from cluster import command
from cluster.host import ClusterError
from cluster.hostpython import PodPython, host_python, volumes_delete_command
from cluster.layout import BIN, CLUSTER_FILE, KUBECONFIG, NODES, RUN

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


@dataclass(frozen=True)
class S3:
    """An S3 service that both tests and pods reach."""

    endpoint: str
    region: str
    access_key: str
    secret_key: str

    @property
    def env(self) -> dict[str, str]:
        """The variables that boto3 and other clients read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        }

    def client(self) -> "S3Client":
        """A boto3 client on this side."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )


@dataclass(frozen=True)
class Cluster:
    """A cluster under test: tests/cluster's own, or the one that HEADRACE_TEST_KUBECONFIG names."""

    kubeconfig: Path
    kubectl_program: str
    helm_program: str
    nodes: tuple[str, ...]
    own: bool
    """own says that this is tests/cluster's cluster: fail_node, and the host's route to pods, exist only there."""
    s3: S3 | None = None
    operator_image: str = ""
    trainer_image: str = ""

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_seconds: float = 120) -> str:
        """Run kubectl and return what it prints; AssertionError carries what it complains about."""
        return run_checked([*self._kubectl, *arguments], stdin, timeout_seconds)

    def helm(self, *arguments: str, timeout_seconds: float = 180) -> str:
        """Run helm, as `kubectl`."""
        return run_checked([self.helm_program, "--kubeconfig", str(self.kubeconfig), *arguments], None, timeout_seconds)

    def apply(self, *objects: dict[str, Any]) -> None:
        """Create or update objects."""
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get` as a value."""
        return dict(json.loads(self.kubectl("get", *arguments, "-o", "json")))

    def wait(self, condition: Callable[[], bool], what: str, *, timeout_seconds: float = 60) -> None:
        """Poll until a condition holds."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {timeout_seconds:g} s"
            time.sleep(0.2)

    def wait_for_pod(self, namespace: str, name: str, *, phase: str = "Succeeded", timeout_seconds: float = 60) -> None:
        """Wait for a pod's phase; if it ends otherwise, fail with its state and log."""

        def reached() -> bool:
            now = self.get("pod", name, "-n", namespace)["status"].get("phase", "")
            assert now == phase or now not in ("Succeeded", "Failed"), self.explain(namespace, name)
            return bool(now == phase)

        try:
            self.wait(reached, f"pod {name} {phase}", timeout_seconds=timeout_seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.explain(namespace, name)}") from error

    def explain(self, namespace: str, pod: str) -> str:
        """All there is to know about a pod that did not do what it should."""
        questions = (["describe", "pod", pod], ["logs", pod, "--all-containers"])
        words = [[*self._kubectl, "-n", namespace, *question] for question in questions]
        answers = [subprocess.run(line, capture_output=True, text=True, check=False) for line in words]
        return "\n".join(answer.stdout + answer.stderr for answer in answers)

    def fail_node(self, name: str) -> None:
        """Cut a node's power; `heal` gives it back."""
        assert self.own, "only tests/cluster's own nodes can be failed"
        command.fail_node(name)

    def heal(self) -> None:
        command.heal()

    @property
    def _kubectl(self) -> list[str]:
        return [self.kubectl_program, "--kubeconfig", str(self.kubeconfig)]


def run_checked(words: list[str], stdin: str | None, timeout_seconds: float) -> str:
    environment = {**os.environ, "KUBECACHEDIR": str(RUN / "kubectl-cache")}
    done = subprocess.run(
        words, input=stdin, env=environment, text=True, capture_output=True, timeout=timeout_seconds, check=False
    )
    assert done.returncode == 0, f"`{' '.join(words)}` exited with {done.returncode}: {done.stderr}{done.stdout}"
    return done.stdout


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The cluster, brought up if it is not; it stays up, for the next session."""
    other = os.environ.get(command.OTHER_CLUSTER)
    return other_cluster(Path(other)) if other else own_cluster()


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh namespace that enforces `restricted`, removed after the test."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}})
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def python(cluster: Cluster, namespace: str) -> Iterator[PodPython]:
    """A Python with torch for pods of the test's namespace: this checkout's, or another cluster's trainer image."""
    yield prepare_python(cluster, namespace)
    if cluster.own:
        cluster.kubectl(*volumes_delete_command(namespace))


def prepare_python(cluster: Cluster, namespace: str) -> PodPython:
    """As the fixture, for a namespace that the caller made; remove with `volumes_delete_command`."""
    python = python_of(cluster, namespace)
    if python.objects:
        cluster.apply(*python.objects)
        # A pod that meets an unbound claim on its node waits ten seconds before it looks again.
        bound = ["--for=jsonpath={.status.phase}=Bound", "--timeout=60s"]
        cluster.kubectl("wait", *bound, "persistentvolumeclaim", "--all", "-n", namespace)
    return python


def python_of(cluster: Cluster, namespace: str) -> PodPython:
    """The Python of trainers' pods in a namespace; its volumes and claims are yet to be applied."""
    if cluster.own:
        return host_python(namespace)
    if not cluster.trainer_image:
        give_up("set HEADRACE_TEST_TRAINER_IMAGE to an image that the cluster can pull")
    return PodPython(namespace, image=cluster.trainer_image, image_pull_policy="IfNotPresent", python="python3")


def own_cluster() -> Cluster:
    try:
        command.require_root()
    except ClusterError as error:
        give_up(str(error))
    command.up()
    facts = json.loads(CLUSTER_FILE.read_text())
    s3 = facts["s3"]
    return Cluster(
        kubeconfig=KUBECONFIG,
        kubectl_program=str(BIN / "kubectl"),
        helm_program=str(BIN / "helm"),
        nodes=tuple(node.name for node in NODES),
        own=True,
        s3=S3(endpoint=s3["endpoint"], region=s3["region"], access_key=s3["accessKey"], secret_key=s3["secretKey"]),
        operator_image=facts["images"]["operator"],
        trainer_image=facts["images"]["hostPython"],
    )


def other_cluster(kubeconfig: Path) -> Cluster:
    """A cluster that somebody else runs."""
    command.build_all()
    get_nodes = [str(BIN / "kubectl"), "--kubeconfig", str(kubeconfig), "get", "nodes", "-o", "name"]
    names = subprocess.run(get_nodes, check=True, capture_output=True, text=True).stdout.split()
    return Cluster(
        kubeconfig=kubeconfig,
        kubectl_program=str(BIN / "kubectl"),
        helm_program=str(BIN / "helm"),
        nodes=tuple(name.removeprefix("node/") for name in names),
        own=False,
        s3=other_s3(),
        operator_image=os.environ.get("HEADRACE_TEST_OPERATOR_IMAGE", ""),
        trainer_image=os.environ.get("HEADRACE_TEST_TRAINER_IMAGE", ""),
    )


def other_s3() -> S3 | None:
    """The S3 service that goes with another cluster, if there is one."""
    prefix = "HEADRACE_TEST_S3_"
    if f"{prefix}ENDPOINT" not in os.environ:
        return None
    return S3(
        endpoint=os.environ[f"{prefix}ENDPOINT"],
        region=os.environ.get(f"{prefix}REGION", "us-east-1"),
        access_key=os.environ[f"{prefix}ACCESS_KEY"],
        secret_key=os.environ[f"{prefix}SECRET_KEY"],
    )


def give_up(reason: str) -> NoReturn:
    """Skip on a user's machine; in CI a tier that does not run is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
