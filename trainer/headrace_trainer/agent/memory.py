"""OOM detection: the kernel counts OOM kills per control group."""

from pathlib import Path

_FILES = {"": "memory.events", "memory": "memory.oom_control"}
"""Controller as named in ``/proc/self/cgroup`` -> the file with the count, for cgroup v2 and v1."""


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes in this control group the OOM killer has killed; None if the kernel does not say.

    Args:
        root: the parent of ``proc`` and ``sys``.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in _FILES:
                mount = root / "sys/fs/cgroup" / controller
                # In a container the path may be the host's, of which only the innermost folder is mounted.
                for folder in (mount / path.lstrip("/"), mount):
                    count = _count(folder / _FILES[controller])
                    if count is not None:
                        return count
    return None


def _count(file: Path) -> int | None:
    try:
        entries = dict(line.split() for line in file.read_text().splitlines())
        return int(entries["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None
