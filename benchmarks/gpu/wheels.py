"""Wheels for a machine without a network: ``python -m benchmarks.gpu.wheels``.

In: the pinned, hashed requirements of the GPU image. Out: ``build/gpu/part-00``, ``part-01`` and so on, none of them
larger than a transfer may be; ``benchmarks/gpu/install.sh`` puts them together again. Large wheels are cut into pieces.
Only what a machine with CUDA's torch lacks is taken.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements" / "gpu.txt"
PARTS = ROOT / "build" / "gpu"
PART_BYTES = 60 * 2**20

WHEELS = [
    "annotated-types",
    "einops",
    "importlib-metadata",
    "megatron-core",
    "ml-dtypes",
    "nvdlfw-inspect",
    "nvidia-cudnn-frontend",
    "nvidia-curand",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "psutil",
    "pydantic",
    "pydantic-core",
    "setuptools",
    "transformer-engine",
    "transformer-engine-cu13",
    "typing-inspection",
    "zipp",
]
SOURCES = ["transformer-engine-torch"]
"""Compiled on the machine, against its torch."""
TESTS = ["pytest", "pluggy", "iniconfig"]
"""For ``make test-gpu``."""


def pinned(text: str, names: list[str]) -> str:
    """The requirements of these names with their hashes.

    Raises:
        ValueError: a name is not in the file.
    """
    blocks = re.findall(r"^[a-z](?:.*\\\n)*.*", text, flags=re.MULTILINE)
    by_name = {re.split(r"[=\[ ]", block, maxsplit=1)[0]: block for block in blocks}
    if missing := [name for name in names if name not in by_name]:
        raise ValueError(f"{REQUIREMENTS.name}: has no {', '.join(missing)}: run make lock, or change the list")
    return "\n".join(by_name[name] for name in names) + "\n"


def download(names: list[str], into: Path, *, python: str, requirements: Path, sources: bool = False) -> None:
    """Fetch one file a requirement, as they are pinned; nothing is installed or built."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as chosen:
        chosen.write(pinned(requirements.read_text(), names))
        chosen.flush()
        platform = ["--only-binary=:all:", "--python-version", python]
        for glibc in ("2_28", "2_27", "2_17", "2014"):
            platform += ["--platform", f"manylinux{'' if glibc == '2014' else '_'}{glibc}_x86_64"]
        kind = ["--no-binary=:all:", "--no-build-isolation"] if sources else platform
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *kind]
        subprocess.run([*command, "--dest", str(into), "--requirement", chosen.name], check=True)


def pieces(path: Path, size: int) -> Iterator[tuple[str, bytes]]:
    """A file, or what it is cut into: names that sort in the order of their bytes."""
    with path.open("rb") as file:
        if path.stat().st_size <= size:
            yield path.name, file.read()
            return
        for number in range(-(-path.stat().st_size // size)):
            yield f"{path.name}.piece-{number:02d}", file.read(size)


def split(folder: Path, parts: Path, *, part_bytes: int = PART_BYTES) -> list[Path]:
    """Deal the files of ``folder`` out to folders of at most ``part_bytes``."""
    made: list[Path] = []
    room = 0
    for path in sorted(folder.iterdir(), key=lambda p: (p.stat().st_size, p.name)):
        for name, data in pieces(path, part_bytes):
            if len(data) > room:
                made.append(parts / f"part-{len(made):02d}")
                made[-1].mkdir(parents=True)
                room = part_bytes
            (made[-1] / name).write_bytes(data)
            room -= len(data)
    return made


def main() -> None:
    """Download and split; say what to carry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="of the machine")
    args = parser.parse_args()
    if PARTS.exists():
        sys.exit(f"{PARTS.relative_to(ROOT)} is there already: remove it first")
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder)
        download(WHEELS, into, python=args.python, requirements=REQUIREMENTS)
        download(TESTS, into, python=args.python, requirements=ROOT / "requirements" / "dev.txt")
        download(SOURCES, into, python=args.python, requirements=REQUIREMENTS, sources=True)
        for part in split(into, PARTS):
            size = sum(p.stat().st_size for p in part.iterdir())
            print(f"{part.relative_to(ROOT)}: {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
