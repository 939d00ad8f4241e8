"""Where everything is: folders, addresses, names. Values only; every other module of this folder reads them.

The cluster is three machines made of Linux namespaces, on one network segment that the host joins as a fourth:

    host 10.230.0.254 ---+--- control 10.230.0.1    etcd, the control plane, CoreDNS, S3; routes between the others
                         +--- node-1  10.230.0.11   containerd, kubelet, kube-proxy, pods in 10.231.1.0/24
                         +--- node-2  10.230.0.12   the same, pods in 10.231.2.0/24
"""

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
STATE = REPO / ".cluster"
BIN = STATE / "bin"
RUN = STATE / "run"
LOGS = STATE / "log"
KUBECONFIG = STATE / "kubeconfig"
CLUSTER_FILE = STATE / "cluster.json"
BEFORE_FILE = STATE / "before.json"

CLUSTER_DOMAIN = "cluster.local"
SERVICE_ACCOUNT_ISSUER = f"https://kubernetes.default.svc.{CLUSTER_DOMAIN}"

SERVICE_CIDR = "10.232.0.0/16"
API_SERVICE_ADDRESS = "10.232.0.1"
DNS_SERVICE_ADDRESS = "10.232.0.10"
POD_CIDR = "10.231.0.0/16"
PREFIX_LENGTH = 24
HOST_LINK = "headrace0"
HOST_ADDRESS = "10.230.0.254"
CGROUP = "headrace"


@dataclass(frozen=True)
class Machine:
    """One set of namespaces: its own network, mounts, processes and host name."""

    name: str
    address: str
    pod_cidr: str = ""

    @property
    def folder(self) -> Path:
        """folder keeps what would lie under /var on a real machine."""
        return RUN / self.name


CONTROL = Machine("control", "10.230.0.1")
NODES = (
    Machine("node-1", "10.230.0.11", "10.231.1.0/24"),
    Machine("node-2", "10.230.0.12", "10.231.2.0/24"),
)
MACHINES = (CONTROL, *NODES)

API_URL = f"https://{CONTROL.address}:6443"
S3_ADDRESS = f"{CONTROL.address}:7070"
S3_REGION = "us-east-1"

PAUSE_IMAGE = "headrace.test/pause:1"
BUSYBOX_IMAGE = "headrace.test/busybox:1"
HOST_PYTHON_IMAGE = "headrace.test/host-python:1"
