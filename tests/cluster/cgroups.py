"""The control groups under which kubelets put their pods: made before a kubelet starts, removed by `down`. Versions 1 and 2."""

import contextlib
from functools import partial
from pathlib import Path

from cluster.host import wait_until
from cluster.layout import CGROUP

ROOT = Path("/sys/fs/cgroup")


def name_of(machine: str) -> str:
    return f"{CGROUP}/{machine}"


def create(machine: str) -> None:
    """Make the machine's group in every hierarchy."""
    for hierarchy in hierarchies():
        folder = hierarchy
        for part in name_of(machine).split("/"):
            delegate_controllers(folder)
            folder = folder / part
            folder.mkdir(exist_ok=True)
            copy_cpuset(folder)
        raise_weight(hierarchy / CGROUP)


def hierarchies() -> list[Path]:
    """Version 2 has one tree; version 1 has one for each controller."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return [folder for folder in ROOT.iterdir() if not folder.is_symlink() and (folder / "cgroup.procs").exists()]


def delegate_controllers(folder: Path) -> None:
    """Version 2: a group's children get only the controllers that it passes on."""
    available = folder / "cgroup.controllers"
    if available.exists():
        for controller in available.read_text().split():
            # Some controllers refuse while the group has processes of its own; kubelet needs the others.
            with contextlib.suppress(OSError):
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")


def copy_cpuset(folder: Path) -> None:
    """Version 1: a new cpuset is empty, and nothing can run in it."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        file = folder / name
        if file.exists() and not (ROOT / "cgroup.controllers").exists() and not file.read_text().strip():
            file.write_text((folder.parent / name).read_text())


def raise_weight(folder: Path) -> None:
    """By default all pods together get as much CPU as one process of the host: on a busy machine every test would time out."""
    for name, weight in (("cpu.shares", "8192"), ("cpu.weight", "800")):
        if (folder / name).exists():
            (folder / name).write_text(weight)


def remove(group: str = CGROUP) -> None:
    """Remove a group and all below it; the kernel lets go of one a moment after its last process."""
    wait_until(partial(is_removed, group), f"the removal of the control groups {group}", timeout_seconds=20)


def is_removed(group: str) -> bool:
    """Remove what can be removed now; whether that was everything."""
    for hierarchy in hierarchies():
        top = hierarchy / group
        folders = [top, *top.rglob("*/")] if top.exists() else []
        for folder in sorted((folder for folder in folders if folder.is_dir()), reverse=True):
            try:
                folder.rmdir()
            except OSError:
                return False
    return True
