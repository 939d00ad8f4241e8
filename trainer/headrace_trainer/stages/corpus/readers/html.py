"""HTML: the main text of a page, without menus and footers, by trafilatura."""

import logging
from collections.abc import Iterator
from pathlib import Path

import trafilatura

from headrace_trainer.formats.opening import open_bytes
from headrace_trainer.stages.corpus.readers.record import Record
from headrace_trainer.stages.corpus.sources import SourceFile

# A page without main text is counted in the funnel; a line in the log for each says no more.
logging.getLogger("trafilatura").setLevel(logging.CRITICAL)


def main_text(page: bytes) -> str:
    """The main text of an HTML page of any encoding; empty where there is none."""
    if not page.strip():
        return ""
    return trafilatura.extract(page, favor_precision=True, include_comments=False) or ""


def read_html(path: Path, file: SourceFile) -> Iterator[Record]:
    """The main text of the page as one record."""
    with open_bytes(path, file.address) as stream:
        yield Record(number=1, text=main_text(stream.read()))
