"""Plain text: one document per file."""

from collections.abc import Iterator
from pathlib import Path

from headrace_trainer.formats.opening import decode_utf8, open_bytes
from headrace_trainer.stages.corpus.readers.record import Record
from headrace_trainer.stages.corpus.sources import SourceFile


def read_text(path: Path, file: SourceFile) -> Iterator[Record]:
    """One record: the whole file."""
    with open_bytes(path, file.address) as stream:
        yield Record(number=1, text=decode_utf8(stream.read(), file.address))
