"""The nodes' daemons: containerd, kubelet and kube-proxy, each node with its own, as on a real machine.

containerd and kubelet keep their default folders: a machine has a /run, /var/lib and /var/log of its own.
"""

import json
from pathlib import Path

from cluster import certificates as pki
from cluster import cgroups, images, network, operatorimage
from cluster.host import run, succeeds, wait_until
from cluster.layout import BIN, CLUSTER_DOMAIN, CONTROL, DNS_SERVICE_ADDRESS, PAUSE_IMAGE, POD_CIDR, RUN, Machine
from cluster.machines import enter, log_path, spawn
from cluster.packages import CNI_FOLDER, program

CONTAINERD_SOCKET = "/run/containerd/containerd.sock"


def start(node: Machine) -> None:
    """Configure and start the node's daemons; it turns Ready some seconds later."""
    network.write_cni(node)
    cgroups.remove(cgroups.name_of(node.name))  # a reboot forgets the groups of the pods that ran before it
    cgroups.create(node.name)
    start_containerd(node)
    start_kubelet(node)
    start_kube_proxy(node)


def start_containerd(node: Machine) -> None:
    config = node.folder / "containerd.toml"
    config.write_text(
        CONTAINERD.format(pause=PAUSE_IMAGE, cni_programs=CNI_FOLDER, cni_config=network.cni_folder(node))
    )
    spawn(node, "containerd", [program("containerd"), "--config", config])
    log = log_path(node, "containerd")
    wait_until(lambda: succeeds([*ctr(node), "version"]), f"containerd on {node.name}", timeout_seconds=30, log=log)
    for archive in sorted(images.FOLDER.glob("*.tar")):
        load(node, archive)
    load_operator(node)


def load(node: Machine, archive: Path) -> None:
    """Give the node the images of an archive."""
    run([*ctr(node), "images", "import", archive])


def load_operator(node: Machine) -> None:
    """Give the node the operator's image as it was last built."""
    if operatorimage.name() not in run([*ctr(node), "images", "list", "--quiet"]).split():
        load(node, operatorimage.ARCHIVE)


def ctr(node: Machine) -> list[str]:
    """The words that ask the node's containerd; kubelet's images are in the namespace `k8s.io`."""
    return [*enter(node), program("ctr"), "--namespace", "k8s.io"]


def start_kubelet(node: Machine) -> None:
    resolv_conf = RUN / "resolv.conf"
    resolv_conf.write_text(f"nameserver {CONTROL.address}\n")
    config = write_json(node.folder / "kubelet.json", kubelet_config(node, resolv_conf))
    arguments = [f"--config={config}", f"--kubeconfig={pki.kubeconfig(node.name)}", f"--node-ip={node.address}"]
    spawn(node, "kubelet", [BIN / "kubelet", *arguments, f"--hostname-override={node.name}"])


def start_kube_proxy(node: Machine) -> None:
    config = write_json(node.folder / "kube-proxy.json", kube_proxy_config(node))
    spawn(node, "kube-proxy", [BIN / "kube-proxy", f"--config={config}"])


def write_json(path: Path, document: dict[str, object]) -> Path:
    path.write_text(json.dumps(document, indent=2))
    return path


def kubelet_config(node: Machine, resolv_conf: Path) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": False}, "x509": {"clientCAFile": str(pki.AUTHORITY)}},
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroups.name_of(node.name)}",
        "clusterDNS": [DNS_SERVICE_ADDRESS],
        "clusterDomain": CLUSTER_DOMAIN,
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "localStorageCapacityIsolation": False,
        "resolvConf": str(resolv_conf),
        # The host's disk may well be nearly full, and images cannot be pulled again: never evict or collect for that.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
    }


def kube_proxy_config(node: Machine) -> dict[str, object]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "hostnameOverride": node.name,
        "clusterCIDR": POD_CIDR,
        "clientConnection": {"kubeconfig": str(pki.kubeconfig("kube-proxy"))},
        # Zero leaves the kernel's connection table as it is: its size belongs to the whole host.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }


# restrict_oom_score_adj: without CAP_SYS_RESOURCE every sandbox would fail. disable_apparmor: its profile would stay in the kernel.
CONTAINERD = """\
version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
                    "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni_programs}"
    conf_dir = "{cni_config}"
"""
