"""What `python3 tests/cluster ...` does: build, up, status, down, and two for failure tests, fail-node and heal.

With HEADRACE_TEST_KUBECONFIG set, tests use that cluster: `build` then makes the programs only, the others have nothing to do.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from cluster import (
    addons,
    build,
    certificates,
    cgroups,
    controlplane,
    images,
    leftovers,
    machines,
    network,
    nodes,
    operatorimage,
    packages,
)
from cluster.host import ClusterError, succeeds
from cluster.layout import (
    BEFORE_FILE,
    BIN,
    BUSYBOX_IMAGE,
    CLUSTER_DOMAIN,
    CLUSTER_FILE,
    CONTROL,
    DNS_SERVICE_ADDRESS,
    HOST_ADDRESS,
    HOST_LINK,
    HOST_PYTHON_IMAGE,
    KUBECONFIG,
    LOGS,
    MACHINES,
    NODES,
    RUN,
    S3_ADDRESS,
    S3_REGION,
    SERVICE_ACCOUNT_ISSUER,
    STATE,
    Machine,
)

OTHER_CLUSTER = "HEADRACE_TEST_KUBECONFIG"


def main(arguments: list[str]) -> int:
    """Run one command; the exit status is 0 when it did what it says."""
    parser = argparse.ArgumentParser(prog="tests/cluster", description="A real Kubernetes cluster on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in HELP.items():
        command = commands.add_parser(name, help=help_text)
        if name == "fail-node":
            command.add_argument("node", choices=[node.name for node in NODES])
        if name == "load":
            command.add_argument("archive", type=Path)
    options = parser.parse_args(arguments)
    os.umask(0o022)  # pods run as another user and must be able to read what their mounts pass through
    if os.environ.get(OTHER_CLUSTER) and options.command != "build":
        print(f"{OTHER_CLUSTER} is set: tests use that cluster, `{options.command}` has nothing to do here")
        return 0
    try:
        return run_command(options)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


HELP = {
    "build": "build the programs into .cluster/bin and the operator's image, if their sources changed",
    "up": "bring the cluster up, or do nothing if it is; writes .cluster/kubeconfig and .cluster/cluster.json",
    "status": "say what is up; exit 1 if something is not",
    "down": "end it and remove every trace; exit 1 if something is left",
    "load": "give the images of an archive to every node, as `docker save` writes it",
    "fail-node": "cut a node's power",
    "heal": "start failed nodes again",
}


def run_command(options: argparse.Namespace) -> int:
    match options.command:
        case "build":
            build_all()
        case "up":
            up()
        case "status":
            return status()
        case "down":
            return down()
        case "load":
            load(options.archive)
        case "fail-node":
            fail_node(options.node)
        case "heal":
            heal()
    return 0


def build_all() -> None:
    """The Go programs, the Debian packages, and the operator's image, which is built with some of them."""
    build.build()
    if os.environ.get(OTHER_CLUSTER):
        return
    require_root()
    packages.install_missing()
    operatorimage.build()


def up() -> None:
    """Bring the whole cluster up; what a run that died halfway left is removed first."""
    require_root()
    with lock():
        build_all()
        if is_complete():
            for node in NODES:
                nodes.load_operator(node)
            write_cluster_file(json.loads(CLUSTER_FILE.read_text())["s3"]["secretKey"])
            print("the cluster is up")
            return
        if anything_exists():
            print("removing an incomplete cluster", flush=True)
            remove()
        refuse_foreign_network()
        leftovers.remember()
        create()


def create() -> None:
    """Build the cluster from nothing, in the order in which its parts need each other."""
    started, since = time.monotonic(), datetime.now(UTC)
    RUN.mkdir(parents=True)
    step("keys", certificates.create)
    step("images", images.create)
    step("machines", start_machines)
    step("API server", controlplane.start_api_server)
    controlplane.start_controllers()
    controlplane.start_dns()
    secret_key = controlplane.start_s3()
    step("containerd, kubelet, kube-proxy", start_nodes)
    step("objects", addons.apply)
    step("DNS", controlplane.wait_for_dns)
    step("S3", controlplane.wait_for_s3)
    step("nodes Ready", lambda: addons.wait_for_nodes(NODES, since=since))
    addons.wait_for_service_account()
    write_cluster_file(secret_key)
    print(f"up in {time.monotonic() - started:.1f} s: export KUBECONFIG={KUBECONFIG}", flush=True)


def step(name: str, action: Callable[[], object]) -> None:
    started = time.monotonic()
    action()
    print(f"  {name}: {time.monotonic() - started:.1f} s", flush=True)


def start_machines() -> None:
    machines.start(CONTROL)
    network.connect_control()
    for node in NODES:
        start_node_machine(node)


def start_nodes() -> None:
    for node in NODES:
        nodes.start(node)


def start_node_machine(node: Machine) -> None:
    machines.start(node)
    network.connect_node(node)


def write_cluster_file(secret_key: str) -> None:
    certificates.write_private(CLUSTER_FILE, json.dumps(describe(secret_key), indent=2))


def describe(secret_key: str) -> dict[str, object]:
    """What tests need to know, for cluster.json."""
    return {
        "kubeconfig": str(KUBECONFIG),
        "bin": str(BIN),
        "logs": str(LOGS),
        "nodes": [{"name": node.name, "address": node.address, "podCidr": node.pod_cidr} for node in NODES],
        "hostAddress": HOST_ADDRESS,
        "dns": {"address": DNS_SERVICE_ADDRESS, "domain": CLUSTER_DOMAIN},
        "serviceAccountIssuer": SERVICE_ACCOUNT_ISSUER,
        "images": {
            "busybox": BUSYBOX_IMAGE,
            "hostPython": HOST_PYTHON_IMAGE,
            "operator": operatorimage.name(),
        },
        "s3": {
            "endpoint": f"http://{S3_ADDRESS}",
            "region": S3_REGION,
            "accessKey": controlplane.S3_ACCESS_KEY,
            "secretKey": secret_key,
        },
    }


def status() -> int:
    """Print each machine's state and the nodes as Kubernetes sees them."""
    for machine in MACHINES:
        print(f"{machine.name:8} {machine.address:12} {'up' if machines.is_up(machine) else 'down'}")
    print(f"API server {'ready' if is_complete() else 'not ready'}; logs in {LOGS}")
    return 0 if is_complete() else 1


def is_complete() -> bool:
    """Whether `up` once finished and everything still runs."""
    machines_up = all(machines.is_up(machine) for machine in MACHINES)
    return CLUSTER_FILE.exists() and machines_up and succeeds([*addons.KUBECTL, "get", "--raw", "/readyz"])


def anything_exists() -> bool:
    return RUN.exists() or BEFORE_FILE.exists() or any(machines.is_up(machine) for machine in MACHINES)


def down() -> int:
    """Remove the cluster and check that nothing stayed behind."""
    require_root()
    with lock():
        started = time.monotonic()
        remove()
        leftovers.wait_for_processes()
        left = leftovers.find()
        BEFORE_FILE.unlink(missing_ok=True)
    if left:
        print("left behind, or changed by something else since `up`:", *left, sep="\n  ", file=sys.stderr)
        return 1
    print(f"down in {time.monotonic() - started:.1f} s; nothing left behind")
    return 0


def remove() -> None:
    """End the machines, and with them every process, mount, interface and rule; then what the host still has."""
    for machine in reversed(MACHINES):
        machines.kill(machine)
    network.disconnect()
    cgroups.remove()
    leftovers.restore_sysctls()
    # Nothing is mounted under these folders here: the machines' mounts were private to them.
    for folder in (RUN, LOGS):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (KUBECONFIG, CLUSTER_FILE):
        file.unlink(missing_ok=True)


def load(archive: Path) -> None:
    require_root()
    for node in NODES:
        nodes.load(node, archive.resolve())


def fail_node(name: str) -> None:
    """Kill everything on a node at once; the control plane finds out by itself after 20 s."""
    require_root()
    with lock():
        machines.kill(node_named(name))


def heal() -> None:
    """Boot every node that is down, with the disk it had, and wait until it is Ready."""
    require_root()
    with lock():
        started = datetime.now(UTC)
        failed = [node for node in NODES if not machines.is_up(node)]
        for node in failed:
            start_node_machine(node)
            nodes.start(node)
        addons.wait_for_nodes(failed, since=started)


def node_named(name: str) -> Machine:
    return next(node for node in NODES if node.name == name)


def require_root() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise ClusterError(f"needs root on Linux; or set {OTHER_CLUSTER} to the kubeconfig of a cluster for tests")


def refuse_foreign_network() -> None:
    """The addresses are fixed, so one machine holds one such cluster, whichever checkout it came from."""
    if network.is_connected():
        raise ClusterError(f"interface {HOST_LINK} exists: another checkout's cluster is up; take it down first")


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """One `up` or `down` at a time; a second one waits."""
    STATE.mkdir(exist_ok=True)
    with (STATE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
