"""Container images without a registry: each is a tar that `ctr images import` reads (the layout of `docker save`).

- pause: the program that holds a pod's namespaces open.
- busybox: a shell and its tools.
- host-python: an empty root that the host's own /usr and Python are mounted into; see hostpython.py.
"""

import hashlib
import io
import json
import platform
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from cluster.host import run
from cluster.layout import BIN, BUSYBOX_IMAGE, HOST_PYTHON_IMAGE, PAUSE_IMAGE, RUN
from cluster.packages import program

FOLDER = RUN / "images"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
NONROOT_UID = 65532
PASSWD = f"root:x:0:0:root:/root:/bin/sh\nnonroot:x:{NONROOT_UID}:{NONROOT_UID}:nonroot:/tmp:/bin/sh\n"
GROUP = f"root:x:0:\nnonroot:x:{NONROOT_UID}:\n"


@dataclass
class Layer:
    """A file tree in the making; paths are relative to the container's root."""

    files: dict[str, bytes] = field(default_factory=dict)
    programs: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    folders: dict[str, int] = field(default_factory=dict)

    def tar(self) -> bytes:
        """The layer's archive; the same tree gives the same bytes."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path, mode in self.folders.items():
                archive.addfile(tar_entry(path, tarfile.DIRTYPE, mode))
            for path, content in self.files.items():
                archive.addfile(tar_entry(path, tarfile.REGTYPE, 0o644, size=len(content)), io.BytesIO(content))
            for path, content in self.programs.items():
                archive.addfile(tar_entry(path, tarfile.REGTYPE, 0o755, size=len(content)), io.BytesIO(content))
            for path, target in self.links.items():
                archive.addfile(tar_entry(path, tarfile.SYMTYPE, 0o777, target=target))
        return buffer.getvalue()


def tar_entry(path: str, kind: bytes, mode: int, *, size: int = 0, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path)
    entry.type, entry.mode, entry.size, entry.linkname = kind, mode, size, target
    return entry


def create() -> list[Path]:
    """Write the image archives and return their paths."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    return [
        write_image("pause", PAUSE_IMAGE, pause_layer(), entrypoint=["/pause"]),
        write_image("busybox", BUSYBOX_IMAGE, busybox_layer(), entrypoint=[]),
        write_image("host-python", HOST_PYTHON_IMAGE, host_python_layer(), entrypoint=[]),
    ]


def pause_layer() -> Layer:
    return Layer(programs={"pause": (BIN / "pause").read_bytes()})


def busybox_layer() -> Layer:
    busybox = program("busybox")
    applets = run([busybox, "--list"]).split()
    return Layer(
        folders={"bin": 0o755, "etc": 0o755, "tmp": 0o1777, "var": 0o755},
        files=account_files(),
        programs={"bin/busybox": Path(busybox).read_bytes()},
        links={f"bin/{applet}": "busybox" for applet in applets if applet != "busybox"},
    )


def host_python_layer() -> Layer:
    """No programs of its own. The links make /bin, /lib and /lib64 lead into /usr wherever they do so on the host."""
    names = ("bin", "sbin", "lib", "lib64")
    links = {name: str(Path("/", name).readlink()) for name in names if Path("/", name).is_symlink()}
    files = account_files()
    linker_cache = Path("/etc/ld.so.cache")
    if linker_cache.exists():
        files["etc/ld.so.cache"] = linker_cache.read_bytes()
    return Layer(folders={"etc": 0o755, "tmp": 0o1777, "usr": 0o755}, files=files, links=links)


def account_files() -> dict[str, bytes]:
    """Enough of /etc for libraries that ask who they run as: torch does."""
    return {"etc/passwd": PASSWD.encode(), "etc/group": GROUP.encode(), "etc/nsswitch.conf": b"hosts: files dns\n"}


def write_image(name: str, tag: str, layer: Layer, *, entrypoint: list[str]) -> Path:
    layer_tar = layer.tar()
    config = json.dumps(
        {
            "architecture": ARCHITECTURES[platform.machine()],
            "os": "linux",
            "config": {"Entrypoint": entrypoint, "Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer_tar).hexdigest()}"]},
        }
    ).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"]}]).encode()
    path = FOLDER / f"{name}.tar"
    archive = Layer(files={"manifest.json": manifest, "config.json": config, "layer.tar": layer_tar})
    path.write_bytes(archive.tar())
    return path
