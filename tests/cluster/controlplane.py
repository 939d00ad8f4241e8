"""The control machine's daemons: etcd, the API server, the controller manager, the scheduler, CoreDNS and S3."""

import secrets
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from cluster import certificates as pki
from cluster.host import wait_until
from cluster.layout import (
    API_URL,
    BIN,
    CLUSTER_DOMAIN,
    CONTROL,
    RUN,
    S3_ADDRESS,
    S3_REGION,
    SERVICE_ACCOUNT_ISSUER,
    SERVICE_CIDR,
)
from cluster.machines import log_path, spawn
from cluster.packages import program

ETCD_URL = "http://127.0.0.1:2379"
S3_ACCESS_KEY = "headrace-test"


def start_api_server() -> None:
    """Start etcd and the API server; returns when it serves."""
    spawn(CONTROL, "etcd", etcd_command())
    spawn(CONTROL, "kube-apiserver", api_server_command())
    log = log_path(CONTROL, "kube-apiserver")
    wait_until(api_server_is_ready, "the API server", timeout_seconds=60, log=log)


def start_controllers() -> None:
    """Start what acts on objects; both want a serving API server."""
    spawn(CONTROL, "kube-controller-manager", controller_manager_command())
    spawn(CONTROL, "kube-scheduler", scheduler_command())


def start_dns() -> None:
    corefile = RUN / "Corefile"
    corefile.write_text(
        COREFILE.format(address=CONTROL.address, domain=CLUSTER_DOMAIN, config=pki.kubeconfig("coredns"))
    )
    spawn(CONTROL, "coredns", [BIN / "coredns", "-conf", corefile])


def wait_for_dns() -> None:
    wait_until(
        lambda: accepts(f"{CONTROL.address}:53"), "CoreDNS", timeout_seconds=30, log=log_path(CONTROL, "coredns")
    )


def start_s3() -> str:
    """Start the S3 server with a fresh secret key, and return the key."""
    folder = RUN / "s3"
    folder.mkdir(parents=True, exist_ok=True)
    secret_key = secrets.token_urlsafe(30)
    command: list[str | Path] = [
        BIN / "versitygw",
        "--port",
        S3_ADDRESS,
        "--region",
        S3_REGION,
        "--quiet",
        "posix",
        folder,
    ]
    spawn(CONTROL, "s3", command, env={"ROOT_ACCESS_KEY": S3_ACCESS_KEY, "ROOT_SECRET_KEY": secret_key})
    return secret_key


def wait_for_s3() -> None:
    wait_until(lambda: accepts(S3_ADDRESS), "S3", timeout_seconds=30, log=log_path(CONTROL, "s3"))


def etcd_command() -> list[str | Path]:
    """No fsync: the data need not survive this machine's crash."""
    urls = ["--listen-client-urls", ETCD_URL, "--advertise-client-urls", ETCD_URL]
    return [program("etcd"), "--data-dir", RUN / "etcd", *urls, "--unsafe-no-fsync", "--logger", "zap"]


def api_server_command() -> list[str | Path]:
    kubelet_client = "kube-apiserver-kubelet-client"
    return [
        BIN / "kube-apiserver",
        f"--etcd-servers={ETCD_URL}",
        f"--advertise-address={CONTROL.address}",
        f"--service-cluster-ip-range={SERVICE_CIDR}",
        f"--client-ca-file={pki.AUTHORITY}",
        f"--tls-cert-file={pki.certificate('kube-apiserver')}",
        f"--tls-private-key-file={pki.key('kube-apiserver')}",
        f"--kubelet-client-certificate={pki.certificate(kubelet_client)}",
        f"--kubelet-client-key={pki.key(kubelet_client)}",
        "--kubelet-preferred-address-types=InternalIP",  # node names resolve nowhere
        f"--service-account-issuer={SERVICE_ACCOUNT_ISSUER}",
        f"--service-account-key-file={pki.SERVICE_ACCOUNT_PUBLIC_KEY}",
        f"--service-account-signing-key-file={pki.SERVICE_ACCOUNT_KEY}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--enable-aggregator-routing=true",  # webhooks go to pod addresses: no kube-proxy on this machine
        "--allow-privileged=true",
    ]


def controller_manager_command() -> list[str | Path]:
    return [
        BIN / "kube-controller-manager",
        f"--kubeconfig={pki.kubeconfig('kube-controller-manager')}",
        f"--root-ca-file={pki.AUTHORITY}",
        f"--service-account-private-key-file={pki.SERVICE_ACCOUNT_KEY}",
        "--use-service-account-credentials=true",
        "--leader-elect=false",
        "--pvclaimbinder-sync-period=1s",  # the default, 15 s, is how long a claim can wait for its volume
        "--node-monitor-grace-period=20s",  # a dead node is noticed in time for a test
    ]


def scheduler_command() -> list[str | Path]:
    return [BIN / "kube-scheduler", f"--kubeconfig={pki.kubeconfig('kube-scheduler')}", "--leader-elect=false"]


# The short cache keeps the first, negative answer for a pod that is just starting from delaying its peers.
COREFILE = """\
.:53 {{
    bind {address}
    errors
    cache 1
    kubernetes {domain} in-addr.arpa {{
        kubeconfig {config}
        pods insecure
    }}
}}
"""


def api_server_is_ready() -> bool:
    """Whether /readyz says yes to the administrator."""
    context = ssl.create_default_context(cafile=str(pki.AUTHORITY))
    context.load_cert_chain(pki.certificate(pki.ADMIN), pki.key(pki.ADMIN))
    try:
        with urllib.request.urlopen(f"{API_URL}/readyz", timeout=2, context=context) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def accepts(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
