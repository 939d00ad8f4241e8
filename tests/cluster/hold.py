"""Process 1 of a machine: sets up its own mounts and host name, says `ready`, then sleeps until it is killed.

When it dies the kernel ends every process of the machine and takes its mounts, interfaces and firewall rules away with it;
that is what makes `down` complete. Started by machines.py as `hold.py FOLDER NAME` inside new namespaces.
"""

import signal
import socket
import subprocess
import sys
from pathlib import Path

# What programs keep under these paths belongs to the machine, so two kubelets never share a file.
OWN_FOLDERS = ("/var/lib", "/var/log")


def main(folder: Path, name: str) -> None:
    socket.sethostname(name)
    mount("--make-rshared", "/")  # kubelet expects mounts to propagate to the containers
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for path in OWN_FOLDERS:
        own = folder / path.strip("/")
        own.mkdir(parents=True, exist_ok=True)
        mount("--bind", str(own), path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then reaps the orphans that end up with process 1
    print("ready", flush=True)
    while True:
        signal.pause()


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
