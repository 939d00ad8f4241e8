"""The operator's image, built from the Dockerfile as users build it: the chart installs it on the test cluster.

In: the Dockerfile and what it copies. Out: an archive under `.cluster/images` and the image's name, whose tag is a digest of
those sources. buildah keeps its layers under `.cluster` too: a change of the sources alone is built in seconds.
"""

import hashlib
import os
import subprocess
import time
from pathlib import Path

from cluster.host import ClusterError
from cluster.layout import REPO, STATE

FOLDER = STATE / "images"
ARCHIVE = FOLDER / "operator.tar"
STAMP = FOLDER / ".operator.tag"
SCRIPT = REPO / "scripts/build-images.sh"
SOURCES = (
    *("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE", "scripts/build-images.sh"),
    *("requirements/build.txt", "requirements/operator.txt", "api", "operator", "trainer", "cli"),
)


def build() -> None:
    """Build the image and its archive, unless they came from the same sources."""
    tag = sources_digest()
    if ARCHIVE.exists() and STAMP.exists() and STAMP.read_text() == tag:
        return
    print("building the operator's image: about a minute and a half without its layers", flush=True)
    started = time.monotonic()
    STAMP.unlink(missing_ok=True)
    environment = {**os.environ, "TAG": tag, "STORE": str(STATE / "buildah"), "ARCHIVES": str(FOLDER)}
    done = subprocess.run(
        ["nice", "sh", SCRIPT, "operator"], env=environment, text=True, capture_output=True, check=False
    )
    if done.returncode != 0:
        raise ClusterError(f"{SCRIPT} exited with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    STAMP.write_text(tag)
    print(f"built in {time.monotonic() - started:.0f} s", flush=True)


def name() -> str:
    """The built image's name, as pods and `ctr` know it."""
    return f"localhost/headrace-operator:{STAMP.read_text()}"


def sources_digest() -> str:
    """One digest over every file that the image is made from, short enough for a tag."""
    digest = hashlib.sha256()
    for file in sorted(file for source in SOURCES for file in files_below(REPO / source)):
        digest.update(str(file.relative_to(REPO)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def files_below(path: Path) -> list[Path]:
    """A file itself, or a folder's files but for what Python leaves there."""
    if path.is_file():
        return [path]
    return [file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
