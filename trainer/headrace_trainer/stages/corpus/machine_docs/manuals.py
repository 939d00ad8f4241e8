"""Python's help topics, which every installation has, and the machine's English manual pages if groff is installed.

In: ``pydoc_data``, /usr/share/man. Out: one ``Found`` per topic or page, as text without layout.
"""

import gzip
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

from headrace_trainer.stages.corpus.machine_docs.found import Found, clean_text

_MANUALS = Path("/usr/share/man")
_RENDER = ("groff", "-mandoc", "-Tutf8", "-P-cbou", "-rHY=0", "-rLL=110n")
_TIMEOUT_SECONDS = 20
_SMALLEST_PAGE_BYTES = 2_000
_SPACES = re.compile(r"(?<=\S) {2,}")


def find_manuals() -> Iterator[Found[str]]:
    """Topics by name, then manual pages by path."""
    for name, text in sorted(topics.topics.items()):
        yield Found(name=f"topics/{name}.txt", content=text.strip())
    if shutil.which(_RENDER[0]) is not None:
        yield from _manual_pages()


def _manual_pages() -> Iterator[Found[str]]:
    for path in sorted(_MANUALS.glob("man[1-8]/*.gz")):
        # Small pages are aliases of others.
        if not path.is_symlink() and path.stat().st_size >= _SMALLEST_PAGE_BYTES:
            text = render(gzip.decompress(path.read_bytes()))
            if text is not None:
                yield Found(name=f"{path.parent.name}/{path.stem}.txt", content=text)


def render(source: bytes) -> str | None:
    """Render a manual page as plain text; None if groff fails."""
    try:
        done = subprocess.run(_RENDER, input=source, capture_output=True, timeout=_TIMEOUT_SECONDS, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    text = clean_text(done.stdout)
    return None if text is None else without_layout(text)


def without_layout(text: str) -> str:
    """Remove indentation and justification; keep paragraphs apart."""
    lines = [_SPACES.sub(" ", line.strip()) for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
