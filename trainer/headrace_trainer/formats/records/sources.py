"""The records of one source: its files by name, their rows in order, all of one shape.

In: an address. Out: records and ``BadRecord`` values. The first row that is an object decides the shape.
"""

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace_api.run import Storage
from headrace_api.stages.data import RecordFormat
from headrace_trainer import board
from headrace_trainer.errors import UserError
from headrace_trainer.formats.files import StoredFile, list_files, local_copy, suffix_of
from headrace_trainer.formats.records.bad import BadRecord, Place, Unusable
from headrace_trainer.formats.records.reading import NumberedRow, read_rows
from headrace_trainer.formats.records.shapes import Record, Row, Shape, columns_read, parse, shape_of

_FORMATS = {
    ".jsonl": RecordFormat.JSONL,
    ".ndjson": RecordFormat.JSONL,
    ".json": RecordFormat.JSONL,
    ".parquet": RecordFormat.PARQUET,
}


@dataclass(frozen=True, kw_only=True)
class RecordSource:
    """Files with records."""

    name: str
    """What the manifest calls it, for errors and the report."""
    files: tuple[tuple[StoredFile, RecordFormat], ...]
    """By name."""
    left_out: tuple[str, ...]
    """Files of the folder whose names say nothing of their format."""


def find_source(uri: str, storage: Storage, *, field: str, format: RecordFormat | None = None) -> RecordSource:
    """The files that an address names.

    Args:
        uri: a file, a folder, an S3 prefix or a pattern.
        storage: names the S3 endpoint and region.
        field: what the manifest calls the address, as ``sft.data.sources[0].uri``.
        format: how all of them are read; by their names if None.

    Raises:
        UserError: there are none, or no name says its format.
    """
    found = [(file, format or _FORMATS.get(suffix_of(file.key))) for file in list_files(uri, storage, field=field)]
    files = tuple((file, known) for file, known in found if known is not None)
    if not files:
        raise UserError(
            f"{field}: {uri!r}: holds {found[0][0].key}, whose name does not say how it is read; "
            "name files .jsonl or .parquet, or set the source's format"
        )
    left_out = tuple(file.key for file, known in found if known is None)
    return RecordSource(name=f"{field}: {uri!r}", files=files, left_out=left_out)


def read_records(
    source: RecordSource, storage: Storage, *, allowed: Collection[Shape], scratch: Path
) -> Iterator[Record | BadRecord]:
    """The records of a source: files by name, rows as they stand.

    Args:
        source: as ``find_source`` gives it.
        storage: names the S3 endpoint and region.
        allowed: the shapes that the stage takes.
        scratch: where files from S3 are put while they are read.

    Raises:
        UserError: a file is damaged, or the first record is of no allowed shape.
    """
    shape: Shape | None = None
    columns = functools.partial(_wanted, allowed=allowed)
    for file, format in source.files:
        with local_copy(file, storage, scratch=scratch) as path:
            for row in read_rows(path, format, address=file.address, columns=columns):
                if isinstance(row, BadRecord):
                    yield row
                else:
                    shape = shape or _first_shape(row, allowed)
                    yield _record(row, shape)
        board.beat()


def _wanted(names: list[str], *, allowed: Collection[Shape]) -> list[str]:
    """The columns of a file that are read: all where prompts are, since the rules that judge answers take the others, and
    all where no shape fits, since the error lists them.
    """
    if Shape.PROMPT in allowed or not any(set(shape.columns) <= set(names) for shape in allowed):
        return names
    return [name for name in names if name in columns_read(allowed)]


def _first_shape(row: NumberedRow, allowed: Collection[Shape]) -> Shape:
    place, values = row
    shape = shape_of(values, allowed)
    if shape is None:
        wanted = "; or ".join(str(s) for s in Shape if s in allowed)
        raise UserError(f"{place}: {_columns(values, place)}; this stage takes {wanted}: rename the fields")
    return shape


def _columns(values: Row, place: Place) -> str:
    found = ", ".join(sorted(name for name, value in values.items() if value is not None))
    return f"the first record has {found}" if found else "the first record has no fields"


def _record(row: NumberedRow, shape: Shape) -> Record | BadRecord:
    place, values = row
    try:
        return parse(values, shape, place=place)
    except Unusable as error:
        return BadRecord(place=place, reason=error.reason, detail=error.detail)
