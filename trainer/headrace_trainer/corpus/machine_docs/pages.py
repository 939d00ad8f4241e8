"""HTML documentation: what the machine's packages brought, then pages that ``pydoc`` renders of the standard library.

In: /usr/share/doc, site-packages, the standard library. Out: one ``Found`` a page.
"""

import contextlib
import gzip
import importlib
import io
import pydoc
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from headrace_trainer.corpus.machine_docs.found import Found

_SMALLEST_PAGE_BYTES = 2_000
# Importing these opens windows, a browser or a test suite, or prints.
_NOT_IMPORTED = frozenset({"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "lib2to3"})
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


def find_pages() -> Iterator[Found[bytes]]:
    """Pages of the machine, by path, then rendered ones, by name."""
    for root in (Path("/usr/share/doc"), Path(sysconfig.get_path("purelib"))):
        yield from _pages_below(root)
    yield from rendered_pages()


def _pages_below(root: Path) -> Iterator[Found[bytes]]:
    paths = (p for pattern in ("*.html", "*.html.gz") for p in root.rglob(pattern))
    for path in sorted(paths):
        page = _read(path)
        if len(page) >= _SMALLEST_PAGE_BYTES:
            yield Found(name=f"{root.name}/{path.relative_to(root).as_posix()}", content=page)


def _read(path: Path) -> bytes:
    """The page; empty where a link leads nowhere."""
    if not path.is_file():
        return b""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def rendered_pages() -> Iterator[Found[bytes]]:
    """``pydoc``'s page of every module of the standard library that can be imported quietly."""
    for name in sorted(sys.stdlib_module_names - _NOT_IMPORTED):
        if not name.startswith("_") and (page := render(name)) is not None:
            yield Found(name=f"pydoc/{name}.html", content=page)


def render(module_name: str) -> bytes | None:
    """One module's documentation as a page; None where the platform does not have the module."""
    writer = pydoc.HTMLDoc()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # deprecated modules are documentation too
            page = writer.page(f"module {module_name}", writer.document(importlib.import_module(module_name)))
    except (ImportError, OSError):
        return None
    # Addresses of objects differ from run to run; and pydoc keeps prose on its lines with spaces that do not break.
    return _ADDRESS.sub("0x0", page).replace("&nbsp;", " ").encode("utf-8", "ignore")
