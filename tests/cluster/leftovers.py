"""Proves that `down` leaves the machine as `up` found it: everything a cluster could leave behind, listed before and after."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import cgroups
from cluster.host import ClusterError, run, wait_until
from cluster.layout import BEFORE_FILE, CGROUP, CLUSTER_FILE, KUBECONFIG, LOGS, RUN
from cluster.machines import HOLDER
from cluster.packages import SEARCH_PATH

# kubelet sets these for the whole host.
SYSCTLS = (
    "kernel.keys.root_maxbytes",
    "kernel.keys.root_maxkeys",
    "kernel.panic",
    "kernel.panic_on_oops",
    "net.ipv4.ip_forward",
    "vm.overcommit_memory",
    "vm.panic_on_oom",
)
PATHS = (
    *("/etc/cni/net.d", "/run/containerd", "/run/flannel", "/run/netns", "/run/xtables.lock"),
    *("/var/lib/cni", "/var/lib/containerd", "/var/lib/etcd/member", "/var/lib/kubelet"),
    *("/var/log/containers", "/var/log/pods", str(CLUSTER_FILE), str(KUBECONFIG), str(LOGS), str(RUN)),
)


def remember() -> None:
    """Write down how the machine looks now, unless a run that never came down did so since the last boot."""
    if not remembered():
        facts = {"boot": boot_id(), "sysctls": read_sysctls(), "seen": snapshot()}
        BEFORE_FILE.write_text(json.dumps(facts, indent=2))


def remembered() -> dict[str, Any]:
    """What `remember` wrote since the machine's last boot; empty if nothing."""
    facts = json.loads(BEFORE_FILE.read_text()) if BEFORE_FILE.exists() else {}
    return facts if facts.get("boot") == boot_id() else {}


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def restore_sysctls() -> None:
    for name, value in remembered().get("sysctls", {}).items():
        sysctl_file(name).write_text(value)


def wait_for_processes() -> None:
    """Give commands that outlived a killed `up` a moment to end by themselves."""
    with contextlib.suppress(ClusterError):
        wait_until(lambda: not processes(), "the end of the cluster's processes", timeout_seconds=10)


def find() -> list[str]:
    """What is here now and was not before `up`, one line each; and what was lost."""
    before = remembered().get("seen", {})
    found: list[str] = []
    for kind, now in snapshot().items():
        then = set(before.get(kind, now))
        found += [f"new {kind}: {item}" for item in sorted(set(now) - then)]
        found += [f"lost {kind}: {item}" for item in sorted(then - set(now))]
    return found + [f"process: {line}" for line in processes()]


def snapshot() -> dict[str, list[str]]:
    """What there is of each kind, as lines that compare equal when nothing changed."""
    return {kind: sorted(listing()) for kind, listing in LISTINGS.items()}


def mounts() -> list[str]:
    """Mount points at or below the cluster's folders: elsewhere other programs mount and unmount as they like."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if any(point == path or point.startswith(f"{path}/") for path in PATHS)]


def control_groups() -> list[str]:
    """The top folder of every hierarchy: below it, other programs come and go."""
    return [str(folder) for hierarchy in cgroups.hierarchies() for folder in hierarchy.iterdir() if folder.is_dir()]


def interfaces() -> list[str]:
    return [folder.name for folder in Path("/sys/class/net").iterdir()]


def network_namespaces() -> list[str]:
    return [str(file) for file in Path("/run/netns").glob("*")]


def routes() -> list[str]:
    return run(["ip", "route", "show", "table", "all"]).splitlines()


def firewall_rules() -> list[str]:
    """Rules and chains of IPv4 and IPv6 in both of the kernel's tables, without their counters."""
    rules = []
    for program in ("iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"):
        lines = run([program], env={"PATH": SEARCH_PATH}).splitlines()
        rules += [f"{program}: {line.split(' [')[0]}" for line in lines if line and not line.startswith("#")]
    return rules


def settings() -> list[str]:
    return [f"{name}={value}" for name, value in read_sysctls().items()]


def existing_paths() -> list[str]:
    return [path for path in PATHS if Path(path).exists()]


def read_sysctls() -> dict[str, str]:
    return {name: sysctl_file(name).read_text().strip() for name in SYSCTLS if sysctl_file(name).exists()}


def sysctl_file(name: str) -> Path:
    return Path("/proc/sys", *name.split("."))


LISTINGS: dict[str, Callable[[], list[str]]] = {
    "mount": mounts,
    "control group": control_groups,
    "interface": interfaces,
    "network namespace": network_namespaces,
    "route": routes,
    "firewall rule": firewall_rules,
    "setting": settings,
    "path": existing_paths,
}


def processes() -> list[str]:
    """Processes that name the cluster's folders, or that run in one of its control groups, as containers do."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            words = process_file(entry, "cmdline")
            if str(RUN) in words or HOLDER in words or f"/{CGROUP}/" in process_file(entry, "cgroup"):
                found.append(f"{entry.name} {words[:200]}")
    return found


def process_file(process: Path, name: str) -> str:
    try:
        return process.joinpath(name).read_bytes().decode(errors="replace").replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""
