"""Wires the machines and the host to one segment: a bridge in the control machine, a virtual cable to each of the others.

Pods have routed addresses (CNI `ptp`, not a bridge): every packet crosses its node's firewall rules, so Services work between
pods of one node and source addresses survive. The host can reach pods and Services; pods have no way to the internet.
"""

import json
from ipaddress import ip_network
from pathlib import Path

from cluster.host import run, succeeds, wait_until
from cluster.layout import CONTROL, HOST_ADDRESS, HOST_LINK, NODES, POD_CIDR, PREFIX_LENGTH, SERVICE_CIDR, Machine
from cluster.machines import enter, holder_pid

SEGMENT = "segment"
# Fixed, because a bridge otherwise takes the lowest of its ports' addresses: a node that comes or goes would change it, and
# all the others would lose the API server until they ask for its address again.
SEGMENT_MAC = "02:00:00:00:00:01"
UPLINK = "eth0"


def connect_control() -> None:
    """Make the segment, put the host on it, and let the control machine forward for everybody."""
    inside = [*enter(CONTROL), "ip"]
    run([*inside, "link", "add", SEGMENT, "address", SEGMENT_MAC, "type", "bridge"])
    run([*inside, "address", "add", f"{CONTROL.address}/{PREFIX_LENGTH}", "dev", SEGMENT])
    run([*inside, "link", "set", SEGMENT, "up"])
    run([*enter(CONTROL), "sysctl", "-q", "-w", "net.ipv4.ip_forward=1"])
    run(["ip", "link", "add", HOST_LINK, "type", "veth", "peer", "name", "host", "netns", str(holder_pid(CONTROL))])
    run([*inside, "link", "set", "host", "master", SEGMENT, "up"])
    run(["ip", "address", "add", f"{HOST_ADDRESS}/{PREFIX_LENGTH}", "dev", HOST_LINK])
    run(["ip", "link", "set", HOST_LINK, "up"])
    for cidr in (POD_CIDR, SERVICE_CIDR):
        run(["ip", "route", "add", cidr, "via", CONTROL.address])
    # The host reaches Services through the first node's rules: the control machine has no kube-proxy.
    run([*inside, "route", "replace", SERVICE_CIDR, "via", NODES[0].address, "onlink", "dev", SEGMENT])


def connect_node(node: Machine) -> None:
    """Plug a node into the segment and tell it, and the control machine, where pods are."""
    control, inside = [*enter(CONTROL), "ip"], [*enter(node), "ip"]
    control_pid, node_pid = str(holder_pid(CONTROL)), str(holder_pid(node))
    run(["nsenter", "--target", control_pid, "--net", "--", "ip", "link", "add", node.name, "type", "veth",
         "peer", "name", UPLINK, "netns", node_pid])  # fmt: skip
    run([*control, "link", "set", node.name, "master", SEGMENT, "up"])
    run([*inside, "address", "add", f"{node.address}/{PREFIX_LENGTH}", "dev", UPLINK])
    run([*inside, "link", "set", UPLINK, "up"])
    run([*inside, "route", "add", "default", "via", CONTROL.address])
    run([*enter(node), "sysctl", "-q", "-w", "net.ipv4.ip_forward=1"])
    run([*control, "route", "replace", node.pod_cidr, "via", node.address])
    for other in NODES:
        if other != node:
            run([*inside, "route", "replace", other.pod_cidr, "via", other.address])


def disconnect() -> None:
    """Remove the host's end. It also vanishes with the control machine, but a moment later and by the kernel's own hand."""
    succeeds(["ip", "link", "delete", HOST_LINK])
    wait_until(lambda: not is_connected(), f"the removal of interface {HOST_LINK}", timeout_seconds=20)


def is_connected() -> bool:
    """Whether the host is on a cluster's segment."""
    return succeeds(["ip", "link", "show", HOST_LINK])


def write_cni(node: Machine) -> None:
    """The node's pod network, read by containerd."""
    pods = ip_network(node.pod_cidr)
    point_to_point = {
        "type": "ptp",
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": str(pods), "gateway": str(pods[1])}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    plugins = [point_to_point, {"type": "portmap", "capabilities": {"portMappings": True}}]
    document = {"cniVersion": "1.0.0", "name": "pods", "plugins": plugins}
    folder = cni_folder(node)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "10-pods.conflist").write_text(json.dumps(document, indent=2))


def cni_folder(node: Machine) -> Path:
    return node.folder / "cni"
