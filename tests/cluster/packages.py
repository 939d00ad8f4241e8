"""The Debian packages that the cluster runs on: found by the programs in them, installed when one is missing."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from cluster.host import ClusterError, run, succeeds

CNI_FOLDER = Path("/usr/lib/cni")
POLICY_FILE = Path("/usr/sbin/policy-rc.d")
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])

PACKAGE_OF = {
    "buildah": "buildah",
    "busybox": "busybox-static",
    "containerd": "containerd",
    "debootstrap": "debootstrap",
    "etcd": "etcd-server",
    "ip": "iproute2",
    "iptables-save": "iptables",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "runc": "runc",
    "sysctl": "procps",
    str(CNI_FOLDER / "ptp"): "containernetworking-plugins",
}


def program(name: str) -> str:
    """The absolute path of an installed program."""
    path = shutil.which(name, path=SEARCH_PATH)
    if path is None:
        raise ClusterError(f"{name} is not installed (package {PACKAGE_OF.get(name, name)})")
    return path


def install_missing() -> None:
    """Install what is missing with apt-get, without starting any service that a package brings."""
    missing = sorted({package for name, package in PACKAGE_OF.items() if shutil.which(name, path=SEARCH_PATH) is None})
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise ClusterError(
            f"install these Debian packages, or what carries the same programs here: {' '.join(missing)}"
        )
    print(f"installing {' '.join(missing)}", flush=True)
    with services_kept_down():
        if not apt_install(missing):
            run(["apt-get", "update"])
            if not apt_install(missing):
                raise ClusterError(f"apt-get could not install {' '.join(missing)}: run it by hand to see why")
    disable_services()


def apt_install(packages: list[str]) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "--no-remove", *packages]
    return subprocess.run(command, env=environment, check=False).returncode == 0


@contextlib.contextmanager
def services_kept_down() -> Iterator[None]:
    """Debian asks policy-rc.d before it starts a new package's service; 101 means no."""
    if POLICY_FILE.exists():
        yield
        return
    POLICY_FILE.write_text("#!/bin/sh\nexit 101\n")
    POLICY_FILE.chmod(0o755)
    try:
        yield
    finally:
        POLICY_FILE.unlink()


def disable_services() -> None:
    """Keep systemd, where it runs, from starting the new services at the next boot."""
    if Path("/run/systemd/system").exists():
        for service in ("containerd", "etcd"):
            succeeds(["systemctl", "disable", service])
