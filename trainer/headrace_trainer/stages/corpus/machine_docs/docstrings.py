"""Docstrings of the standard library and of installed packages, read with ``ast``: nothing is imported.

In: Python's own folders. Out: one ``Found`` per docstring, package by package, none above its share.
"""

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from headrace_trainer.stages.corpus.machine_docs.found import Found, up_to
from headrace_trainer.stages.corpus.parallel import available_cpus, map_in_order

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests"})
_LARGEST_FILE_BYTES = 2_000_000
_LARGEST_PART = 12
"""One package gives at most a twelfth of the total: otherwise generated API clients would crowd out the rest."""

_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Package:
    """A top-level package or module."""

    root: Path
    path: Path


def find_docstrings(*, max_bytes: int) -> Iterator[Found[str]]:
    """Docstrings in a fixed order, about ``max_bytes`` in total."""
    read = partial(_docstrings_of, max_bytes=max_bytes // _LARGEST_PART)
    for found in map_in_order(read, installed_packages(), workers=available_cpus()):
        yield from found


def installed_packages() -> list[Package]:
    """Top-level packages and modules of the standard library and site-packages, in a fixed arbitrary order."""
    roots = dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))
    found = [Package(root=root, path=path) for root in roots for path in root.iterdir() if _is_package(path)]
    return sorted(found, key=lambda p: _scrambled(p.path, root=p.root))


def _is_package(path: Path) -> bool:
    return path.suffix == ".py" or (path.is_dir() and path.name.isidentifier() and path.name not in _SKIPPED_FOLDERS)


def _docstrings_of(package: Package, *, max_bytes: int) -> list[Found[str]]:
    found = (item for path in _files_of(package) for item in _read_file(path, root=package.root))
    return list(up_to(found, max_bytes=max_bytes))


def _files_of(package: Package) -> list[Path]:
    """The package's files, shuffled in a fixed way, so that the first few are a sample of the whole."""
    if package.path.is_file():
        return [package.path]
    files = (p for p in package.path.rglob("*.py") if not _SKIPPED_FOLDERS & {*p.relative_to(package.root).parts})
    return sorted(files, key=lambda p: _scrambled(p, root=package.root))


def _scrambled(path: Path, *, root: Path) -> bytes:
    """A sort key unrelated to names, so that the sample is not just names that start with A."""
    return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()


def _read_file(path: Path, *, root: Path) -> Iterator[Found[str]]:
    if path.stat().st_size > _LARGEST_FILE_BYTES:
        return
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    yield from docstrings_in(tree, name=module)


def docstrings_in(node: _Definition, *, name: str) -> Iterator[Found[str]]:
    """The docstrings of a definition and of the classes and functions in it.

    Args:
        node: a module, class or function.
        name: its qualified name.
    """
    text = ast.get_docstring(node, clean=False)
    if text and (cleaned := _writable(text)):
        yield Found(name=name, content=cleaned)
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from docstrings_in(child, name=f"{name}.{child.name}")


def _writable(text: str) -> str:
    """Strip indentation, and lone surrogates, which appear in tests of Unicode."""
    return inspect.cleandoc(text).encode("utf-8", "ignore").decode().strip()
