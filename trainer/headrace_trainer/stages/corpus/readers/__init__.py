"""One module per format: bytes -> ``Record`` values. Strict: unreadable input is an error that names the place.

In: a local path and its ``SourceFile``. Out: the texts as found. Next: ``clean``.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from headrace_api.stages.corpus import Format
from headrace_trainer.stages.corpus.readers.html import read_html
from headrace_trainer.stages.corpus.readers.jsonl import read_jsonl
from headrace_trainer.stages.corpus.readers.parquet import read_parquet
from headrace_trainer.stages.corpus.readers.record import Record
from headrace_trainer.stages.corpus.readers.text import read_text
from headrace_trainer.stages.corpus.readers.warc import read_warc, read_wet
from headrace_trainer.stages.corpus.sources import SourceFile

READERS: dict[Format, Callable[[Path, SourceFile], Iterator[Record]]] = {
    Format.WARC: read_warc,
    Format.WET: read_wet,
    Format.JSONL: read_jsonl,
    Format.PARQUET: read_parquet,
    Format.TEXT: read_text,
    Format.HTML: read_html,
}


def read_records(path: Path, file: SourceFile) -> Iterator[Record]:
    """The records of one file, in order.

    Raises:
        UserError: the file is truncated, corrupt, not UTF-8, or not of its format.
    """
    return READERS[file.format](path, file)
