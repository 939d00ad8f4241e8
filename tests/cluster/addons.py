"""The objects a fresh cluster needs before anybody uses it: CoreDNS' rights, and the Service that makes it reachable."""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import partial

from cluster.host import run, succeeds, wait_until
from cluster.layout import BIN, CONTROL, DNS_SERVICE_ADDRESS, KUBECONFIG, RUN, Machine
from cluster.machines import log_path

# A cache of its own: nothing is to stay in the caller's home folder.
KUBECTL = (str(BIN / "kubectl"), "--kubeconfig", str(KUBECONFIG), "--cache-dir", str(RUN / "kubectl-cache"))
DNS_PORTS = ({"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"})
RBAC = "rbac.authorization.k8s.io"


def apply() -> None:
    namespace = [*KUBECTL, "get", "namespace", "kube-system"]
    wait_until(partial(succeeds, namespace), "namespace kube-system", timeout_seconds=20)
    objects = [dns_role(), dns_role_binding(), dns_service(), dns_endpoints()]
    run([*KUBECTL, "apply", "-f", "-"], stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


def wait_for_nodes(nodes: Sequence[Machine], *, since: datetime) -> None:
    """Returns when each node's kubelet has called it Ready after `since`; what an earlier kubelet said does not count."""
    for node in nodes:
        log = log_path(node, "kubelet")
        wait_until(partial(is_ready, node, since=since), f"{node.name} to be Ready", timeout_seconds=90, log=log)


def is_ready(node: Machine, *, since: datetime) -> bool:
    document = run([*KUBECTL, "get", "node", node.name, "--ignore-not-found", "-o", "json"])
    conditions = json.loads(document)["status"]["conditions"] if document else []
    return any(
        condition["type"] == "Ready"
        and condition["status"] == "True"
        # Kubernetes keeps whole seconds.
        and datetime.fromisoformat(condition["lastHeartbeatTime"]) >= since.replace(microsecond=0)
        for condition in conditions
    )


def wait_for_service_account() -> None:
    """Returns when pods may be created in namespace default."""
    log = log_path(CONTROL, "kube-controller-manager")
    account = [*KUBECTL, "get", "serviceaccount", "default"]
    wait_until(partial(succeeds, account), "the default ServiceAccount", timeout_seconds=30, log=log)


def dns_role() -> dict[str, object]:
    rules = [
        {"apiGroups": [""], "resources": ["namespaces", "pods", "services"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    return {"apiVersion": f"{RBAC}/v1", "kind": "ClusterRole", "metadata": {"name": "coredns"}, "rules": rules}


def dns_role_binding() -> dict[str, object]:
    return {
        "apiVersion": f"{RBAC}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "coredns"},
        "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": "coredns"},
        "subjects": [{"apiGroup": RBAC, "kind": "User", "name": "system:coredns"}],
    }


def dns_service() -> dict[str, object]:
    """No selector: CoreDNS runs beside the control plane, not in a pod."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system"},
        "spec": {"clusterIP": DNS_SERVICE_ADDRESS, "ports": list(DNS_PORTS)},
    }


def dns_endpoints() -> dict[str, object]:
    labels = {"kubernetes.io/service-name": "kube-dns"}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": labels},
        "addressType": "IPv4",
        "ports": list(DNS_PORTS),
        "endpoints": [{"addresses": [CONTROL.address], "conditions": {"ready": True}}],
    }
