"""HTML: a page's main text, without menus and footers, by trafilatura."""

import logging
from collections.abc import Iterator
from pathlib import Path

import trafilatura

from headrace_trainer.formats.opening import open_bytes
from headrace_trainer.stages.corpus.readers.record import Record
from headrace_trainer.stages.corpus.sources import SourceFile

# The funnel counts pages without main text; logging each one would add nothing.
logging.getLogger("trafilatura").setLevel(logging.CRITICAL)


def main_text(page: bytes) -> str:
    """The main text of an HTML page in any encoding; empty if it has none."""
    if not page.strip():
        return ""
    return trafilatura.extract(page, favor_precision=True, include_comments=False) or ""


def read_html(path: Path, file: SourceFile) -> Iterator[Record]:
    """One record: the page's main text."""
    with open_bytes(path, file.address) as stream:
        yield Record(number=1, text=main_text(stream.read()))
