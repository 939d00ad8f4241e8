"""HTML documentation: pages shipped with the machine's packages, then ``pydoc`` pages of the standard library.

In: /usr/share/doc, site-packages, the standard library. Out: one ``Found`` per page.
"""

import gzip
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from headrace_trainer.stages.corpus.machine_docs.found import Found
from headrace_trainer.stages.corpus.machine_docs.render import render_all

_SMALLEST_PAGE_BYTES = 2_000
# Importing these opens a window or a browser, runs a test suite, or prints.
_NOT_IMPORTED = frozenset({"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "lib2to3"})


def find_pages() -> Iterator[Found[bytes]]:
    """The machine's pages by path, then rendered ones by name."""
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
    """The page; empty for a dangling link."""
    if not path.is_file():
        return b""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def rendered_pages() -> Iterator[Found[bytes]]:
    """``pydoc`` pages of every standard-library module that can be imported quietly."""
    names = sorted(name for name in sys.stdlib_module_names - _NOT_IMPORTED if not name.startswith("_"))
    for name, page in render_all(names):
        yield Found(name=f"pydoc/{name}.html", content=page.encode("utf-8", "ignore"))
