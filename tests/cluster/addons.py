"""The objects a fresh cluster needs before anybody uses it: CoreDNS' rights, and the Service that makes it reachable."""

import json
from datetime import datetime

from cluster.host import run, succeeds, wait_until
from cluster.layout import BIN, CONTROL, DNS_SERVICE_ADDRESS, KUBECONFIG, NODES, Machine

KUBECTL = (str(BIN / "kubectl"), "--kubeconfig", str(KUBECONFIG))
DNS_PORTS = ({"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"})
RBAC = "rbac.authorization.k8s.io"


def apply() -> None:
    wait_until(
        lambda: succeeds([*KUBECTL, "get", "namespace", "kube-system"]), "namespace kube-system", timeout_seconds=20
    )
    objects = [dns_role(), dns_role_binding(), dns_service(), dns_endpoints()]
    run([*KUBECTL, "apply", "-f", "-"], stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


def wait_for_nodes() -> None:
    """Returns when every node is Ready and pods may be created in namespace default."""
    names = [f"node/{node.name}" for node in NODES]
    wait_until(lambda: succeeds([*KUBECTL, "get", *names]), "the nodes' registration", timeout_seconds=60)
    run([*KUBECTL, "wait", "--for=condition=Ready", "--timeout=90s", *names])
    wait_until(
        lambda: succeeds([*KUBECTL, "get", "serviceaccount", "default"]),
        "the default ServiceAccount",
        timeout_seconds=30,
    )


def wait_for_reboot(node: Machine, *, since: datetime) -> None:
    """Returns when the node's new kubelet has called it Ready; what the old one said still stands until then."""
    wait_until(lambda: is_ready(node, since=since), f"{node.name} to be Ready again", timeout_seconds=90)


def is_ready(node: Machine, *, since: datetime) -> bool:
    status = json.loads(run([*KUBECTL, "get", "node", node.name, "-o", "json"]))["status"]
    ready = next(condition for condition in status["conditions"] if condition["type"] == "Ready")
    return ready["status"] == "True" and datetime.fromisoformat(ready["lastHeartbeatTime"]) > since


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
