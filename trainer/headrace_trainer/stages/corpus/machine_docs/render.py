"""``pydoc``'s pages of modules, as a program of its own: modules show what they see of the process that imports them.

A default argument may be the whole environment, secrets included. So the pages are made by a process that knows nothing: no
environment, no site-packages, and one order of sets. In: names of modules, as arguments. Out: a JSON line for each that can
be imported, ``{"name": ..., "page": ...}``. Needs the standard library alone.
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
    """Pages without the values of data: they are no prose, and some are paths of the machine."""

    def docother(self, object: object, name: str | None = None, mod: str | None = None, *ignored: object) -> str:
        return f"<strong>{name}</strong>" if name else ""


def render_all(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names and pages of the modules that the platform has."""
    # Not the virtual environment's name for the interpreter, which would lead to its packages.
    command = [str(Path(sys.executable).resolve()), "-P", "-s", "-S", __file__, *names]
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    for line in done.stdout.splitlines():
        row = json.loads(line)
        yield row["name"], row["page"]


def render(name: str) -> str | None:
    """One module's documentation as a page; None where the platform does not have the module."""
    writer = _Prose()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # deprecated modules are documentation too
            page = writer.page(f"module {name}", writer.document(importlib.import_module(name)))
    except (ImportError, OSError):
        return None
    # Addresses of objects differ from run to run; and pydoc keeps prose on its lines with spaces that do not break.
    return _ADDRESS.sub("0x0", page).replace("&nbsp;", " ")


def main() -> None:
    """Write the pages to standard output."""
    os.environ.clear()
    for name in sys.argv[1:]:
        if (page := render(name)) is not None:
            print(json.dumps({"name": name, "page": page}))


if __name__ == "__main__":
    main()
