"""A control plane without nodes, for this folder's tests: etcd, an API server and the controllers, on free local ports.

Everything in it is real but the kubelets: Jobs make pods, admission refuses, tokens are signed, garbage is collected; no
container runs, and a test that needs a pod to end writes the pod's status itself. Nothing needs root. The programs are
those that ``tests/cluster`` builds; where they are missing the tests that ask for this are skipped.
"""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from proxies import ApiProxy, started
from world import RUNTIME, World

REPO = Path(__file__).resolve().parents[2]
BIN = REPO / ".cluster" / "bin"
CHART = REPO / "charts" / "headrace"
RELEASE, NAMESPACE = "headrace", "headrace-system"
_KUBERNETES = ("kube-apiserver", "kube-controller-manager", "kubectl", "helm")
TOKEN = "headrace-operator-tests"
_START_SECONDS = 300.0


def missing() -> list[str]:
    """The programs that are not here."""
    here = {name: shutil.which(name) for name in ("etcd", "openssl")}
    here |= {name: str(BIN / name) if (BIN / name).exists() else None for name in _KUBERNETES}
    return [name for name, found in here.items() if found is None]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class ControlPlane:
    """A running control plane; ``folder`` keeps its data, keys and logs."""

    folder: Path
    port: int = field(default_factory=free_port)
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _etcd: str = field(default_factory=lambda: f"http://127.0.0.1:{free_port()}")

    @property
    def url(self) -> str:
        """The API server's address."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def kubeconfig(self) -> Path:
        """An administrator's kubeconfig."""
        return self.folder / "kubeconfig"

    def start(self) -> None:
        """Start everything; returns when the API server serves."""
        etcd, peers = self._etcd, f"http://127.0.0.1:{free_port()}"
        self._write_secrets()
        listen = ["--listen-client-urls", etcd, "--advertise-client-urls", etcd, "--listen-peer-urls", peers]
        self._spawn("etcd", "etcd", "--data-dir", str(self.folder / "etcd"), *listen, "--unsafe-no-fsync")
        self.start_api_server()
        self._write_kubeconfig()
        controllers = ["--leader-elect=false", "--use-service-account-credentials=true", "--secure-port=0"]
        keys = [f"--service-account-private-key-file={self.folder / 'sa.key'}"]
        config = [f"--kubeconfig={self.kubeconfig}"]
        self._spawn("controllers", str(BIN / "kube-controller-manager"), *config, *controllers, *keys)

    def stop(self) -> None:
        """End everything."""
        for name in reversed(list(self._processes)):
            self._kill(name)

    def start_api_server(self) -> None:
        """Start the API server; returns when it serves."""
        self._spawn("kube-apiserver", str(BIN / "kube-apiserver"), *self._api_server_flags())
        self._wait()

    def kill_api_server(self) -> None:
        """End the API server; everything else stays."""
        self._kill("kube-apiserver")

    def write_kubeconfig(self, name: str, *, server: str = "", token: str = TOKEN) -> Path:
        """A kubeconfig of one's own, for another user or by another way to the API server."""
        config = json.loads(self.kubeconfig.read_text())
        config["users"][0]["user"] = {"token": token}
        config["clusters"][0]["cluster"]["server"] = server or self.url
        path = self.folder / f"{name}.kubeconfig"
        path.write_text(json.dumps(config))
        return path

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """kubectl's output as the administrator; CalledProcessError with its words if it fails."""
        command = [str(BIN / "kubectl"), "--kubeconfig", str(self.kubeconfig), *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def apply(self, *objects: dict[str, Any]) -> None:
        """kubectl apply."""
        self.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(_list(objects)))

    def get(self, *arguments: str) -> dict[str, Any]:
        """kubectl get -o json."""
        answer = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        assert isinstance(answer, dict)
        return answer

    def _api_server_flags(self) -> list[str]:
        account = self.folder / "sa.key"
        return [
            f"--etcd-servers={self._etcd}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            f"--cert-dir={self.folder / 'certificates'}",
            "--service-cluster-ip-range=10.96.0.0/16",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={account}",
            f"--service-account-signing-key-file={account}",
            "--authorization-mode=RBAC",
        ]

    def _write_secrets(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        key = ["openssl", "genrsa", "-traditional", "-out", str(self.folder / "sa.key"), "2048"]
        subprocess.run(key, check=True, capture_output=True)
        (self.folder / "tokens.csv").write_text(f'{TOKEN},admin,admin,"system:masters"\n')

    def _write_kubeconfig(self) -> None:
        authority = str(self.folder / "certificates" / "apiserver.crt")
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "clusters": [{"name": "test", "cluster": {"server": self.url, "certificate-authority": authority}}],
            "users": [{"name": "admin", "user": {"token": TOKEN}}],
        }
        self.kubeconfig.write_text(json.dumps(config))

    def _spawn(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        self._processes[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, env={**os.environ})

    def _kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()  # nothing of it is kept, and an API server waits for its watchers otherwise
        process.wait(timeout=30)

    def _wait(self) -> None:
        end = time.monotonic() + _START_SECONDS
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        request = urllib.request.Request(f"{self.url}/readyz", headers={"Authorization": f"Bearer {TOKEN}"})
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(request, timeout=2, context=trusting):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(f"the API server did not start; see {self.folder}/kube-apiserver.log")


def _list(objects: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "List", "items": list(objects)}


@dataclass
class OperatorProcess:
    """An operator outside the cluster, with no more permissions than the chart gives it."""

    control_plane: ControlPlane
    name: str
    port: int = field(default_factory=free_port)
    server: str = ""
    """Another way to the API server than the straight one."""
    _process: subprocess.Popen[bytes] | None = None

    @property
    def identity(self) -> str:
        """What the Lease calls it."""
        assert self._process is not None
        return f"{socket.gethostname()}-{self._process.pid}"

    @property
    def progress_url(self) -> str:
        """Where pods would report."""
        return f"http://127.0.0.1:{self.port}/v1/progress"

    def start(self) -> "OperatorProcess":
        """Start it; it is not yet ready then."""
        log = (self.control_plane.folder / f"{self.name}.log").open("ab")
        environment = {
            **os.environ,
            "KUBECONFIG": str(self._kubeconfig()),
            "POD_NAMESPACE": NAMESPACE,
            "HEADRACE_LEASE": RELEASE,
            "HEADRACE_HOST": "127.0.0.1",
            "HEADRACE_PORT": str(self.port),
            "HEADRACE_PROGRESS_URL": self.progress_url,
            "HEADRACE_LOG_LEVEL": "debug",
        }
        command = [sys.executable, "-m", "headrace_operator.main"]
        self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        return self

    def stop(self, *, gracefully: bool = True) -> int:
        """End it; its exit status."""
        assert self._process is not None
        if gracefully:
            self._process.terminate()
        else:
            self._process.kill()
        return self._process.wait(timeout=30)

    def signal(self, number: int) -> None:
        """Send it a signal, as SIGSTOP."""
        assert self._process is not None
        self._process.send_signal(number)

    def lives(self) -> bool:
        """Whether it has not ended."""
        assert self._process is not None
        return self._process.poll() is None

    def log(self) -> str:
        """What it has logged."""
        return (self.control_plane.folder / f"{self.name}.log").read_text()

    def metrics(self) -> str:
        """What Prometheus would read; empty while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    def leads(self) -> bool:
        """Whether it holds the Lease."""
        return "headrace_operator_leader 1.0" in self.metrics()

    def _kubeconfig(self) -> Path:
        token = self.control_plane.kubectl("-n", NAMESPACE, "create", "token", RELEASE, "--duration=1h").strip()
        return self.control_plane.write_kubeconfig(self.name, server=self.server, token=token)


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane without nodes, with the chart's definitions and permissions."""
    absent = missing()
    if absent:
        pytest.skip(f"needs {', '.join(absent)}; `python3 tests/cluster build` makes them")
    plane = ControlPlane(tmp_path_factory.mktemp("controlplane"))
    try:
        plane.start()
        install_chart(plane)
        yield plane
    finally:
        plane.stop()


def install_chart(plane: ControlPlane) -> None:
    """The chart, but for its Deployment's pods: there are no nodes."""
    helm = [str(BIN / "helm"), "--kubeconfig", str(plane.kubeconfig)]
    command = [*helm, "install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--create-namespace"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def operators(control_plane: ControlPlane) -> Iterator[Callable[..., OperatorProcess]]:
    """Starts operators by name, and ends them after the test."""
    begun: list[OperatorProcess] = []

    def start(name: str, **fields: Any) -> OperatorProcess:
        begun.append(OperatorProcess(control_plane, name, **fields).start())
        return begun[-1]

    yield start
    for operator in begun:
        operator.signal(signal.SIGCONT)
        operator.stop()


@pytest.fixture
def operator(operators: Callable[..., OperatorProcess]) -> OperatorProcess:
    """An operator that leads."""
    begun = operators("operator")
    eventually(begun.leads)
    return begun


@pytest.fixture
def api_proxy(control_plane: ControlPlane) -> Iterator[ApiProxy]:
    """A way to the API server on which a test can answer instead."""
    with started(ApiProxy(control_plane.url, TOKEN)) as proxy:
        yield proxy


@pytest.fixture
def namespace(control_plane: ControlPlane, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace that admits only pods of the ``restricted`` Pod Security level."""
    name = f"t-{abs(hash(request.node.nodeid)) % 10**8}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    control_plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    eventually(lambda: "default" in control_plane.kubectl("-n", name, "get", "serviceaccounts", "-o", "name"))
    yield name
    control_plane.kubectl("delete", "namespace", name, "--wait=false")


def eventually(holds: Callable[[], Any], *, timeout_seconds: float = 90.0) -> Any:
    """What ``holds`` returns, once that is true; AssertionError with its last answer if it never is."""
    end = time.monotonic() + timeout_seconds
    while not (answer := holds()):
        assert time.monotonic() < end, f"after {timeout_seconds:.0f} s still {answer!r}"
        time.sleep(0.1)
    return answer


@pytest.fixture(name="eventually")
def eventually_fixture() -> Callable[..., Any]:
    """``eventually``."""
    return eventually


@pytest.fixture
def world(control_plane: ControlPlane, namespace: str) -> World:
    """A namespace of the control plane, with a runtime; no operator yet."""
    control_plane.apply(RUNTIME)
    return World(control_plane, namespace, eventually)
