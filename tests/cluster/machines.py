"""The machines: Linux namespaces held by one process each (hold.py), and the daemons that run inside them.

A machine is recognised by its holder's command line, never by a remembered process id: so a machine is found, and can be
ended, even when the state folder was lost. Next: network.py wires machines up, controlplane.py and nodes.py fill them.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.host import ClusterError, run, wait_until
from cluster.layout import HERE, LOGS, Machine
from cluster.packages import SEARCH_PATH, program

NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")
HOLDER = str(HERE / "hold.py")


def start(machine: Machine) -> None:
    """Create the machine's namespaces; returns once its mounts are in place."""
    LOGS.mkdir(parents=True, exist_ok=True)
    command = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "--propagation", "private"]
    holder = [sys.executable, HOLDER, str(machine.folder), machine.name]
    with log_path(machine, "machine").open("ab") as log:
        process = subprocess.Popen(
            [*command, *holder],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        raise ClusterError(f"{machine.name}: its namespaces could not be set up; read {log.name}")
    run([*enter(machine), "ip", "link", "set", "lo", "up"])


def kill(machine: Machine) -> None:
    """End the machine as a power cut would: every process in it dies at once."""
    pid = holder_pid(machine)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"the end of {machine.name}", timeout_seconds=30)


def is_up(machine: Machine) -> bool:
    return holder_pid(machine) is not None


def holder_pid(machine: Machine) -> int | None:
    """The host's process id of the machine's process 1."""
    tail = [HOLDER, str(machine.folder), machine.name]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and command_line(entry)[-3:] == tail and is_process_1(entry):
            return int(entry.name)
    return None


def command_line(process: Path) -> list[str]:
    try:
        return process.joinpath("cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_process_1(process: Path) -> bool:
    """Whether the process is the first of its own namespace; `unshare`, its parent, has the same arguments but is not."""
    try:
        status = process.joinpath("status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return fields["NSpid"].split()[-1] == "1" and not fields["State"].strip().startswith("Z")


def enter(machine: Machine) -> list[str]:
    """The words that run a command inside the machine."""
    pid = holder_pid(machine)
    if pid is None:
        raise ClusterError(f"{machine.name} is not up: run `python3 tests/cluster up`")
    return [program("nsenter"), "--target", str(pid), *NAMESPACES, "--"]


def log_path(machine: Machine, daemon: str) -> Path:
    return LOGS / f"{machine.name}.{daemon}.log"


def spawn(machine: Machine, daemon: str, argv: Sequence[str | Path], *, env: dict[str, str] | None = None) -> None:
    """Start a daemon inside the machine; its output goes to its log."""
    words = [*enter(machine), *(str(word) for word in argv)]
    with log_path(machine, daemon).open("ab") as log:
        subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=daemon_environment(env),
            start_new_session=True,
        )


def daemon_environment(more: dict[str, str] | None) -> dict[str, str]:
    """A small environment: nothing of the caller's shell decides how the cluster behaves."""
    return {"PATH": SEARCH_PATH, "HOME": "/", **(more or {})}
