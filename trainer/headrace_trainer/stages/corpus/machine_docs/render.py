"""Render ``pydoc`` pages in a separate process: module documentation reveals the process that imports the module.

A default argument may hold the whole environment, secrets included. So the rendering process has no environment, no
site-packages, and a fixed hash seed. In: module names, as arguments. Out: a JSON line ``{"name": ..., "page": ...}``
for each one that can be imported. Needs only the standard library.
"""

import contextlib
import importlib
import io
import json
import os
import pydoc
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


class _Prose(pydoc.HTMLDoc):
    """Pages without the values of data, which are not prose and may be paths on this machine."""

    def docother(self, object: object, name: str | None = None, mod: str | None = None, *ignored: object) -> str:
        return f"<strong>{name}</strong>" if name else ""


def render_all(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names and pages of the modules available on this platform."""
    # Resolved, because the virtual environment's own path would bring in its packages.
    command = [str(Path(sys.executable).resolve()), "-P", "-s", "-S", __file__, *names]
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    for line in done.stdout.splitlines():
        row = json.loads(line)
        yield row["name"], row["page"]


def render(name: str) -> str | None:
    """One module's documentation page; None if the platform lacks the module."""
    writer = _Prose()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # deprecated modules are documentation too
            page = writer.page(f"module {name}", writer.document(importlib.import_module(name)))
    except (ImportError, OSError):
        return None
    # Object addresses differ between runs, and pydoc joins words with non-breaking spaces.
    return _ADDRESS.sub("0x0", page).replace("&nbsp;", " ")


def main() -> None:
    """Write the pages to standard output."""
    os.environ.clear()
    for name in sys.argv[1:]:
        if (page := render(name)) is not None:
            print(json.dumps({"name": name, "page": page}))


if __name__ == "__main__":
    main()
