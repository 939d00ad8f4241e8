"""A copy of the checkout to be spoiled: what git knows of, and what it does not ignore."""

import os
import shutil
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
_SOURCES = ("api", "operator", "trainer", "cli")


def copy_checkout(target: Path) -> None:
    """Copy the working tree, uncommitted changes included; the built programs of the test cluster are linked."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPO, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in listed:
        source = REPO / name
        if name and source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    if (REPO / ".cluster" / "bin").exists():
        (target / ".cluster").mkdir()
        (target / ".cluster" / "bin").symlink_to((REPO / ".cluster" / "bin").resolve())


def environment(tree: Path) -> dict[str, str]:
    """The environment in which the copy's packages are imported, and not the checkout's."""
    path = os.pathsep.join(str(tree / source) for source in _SOURCES)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
