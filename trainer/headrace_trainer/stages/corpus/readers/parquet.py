"""Parquet: one document per row, its text in the column ``textField``."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from headrace_trainer.errors import UserError
from headrace_trainer.stages.corpus.readers.record import Record
from headrace_trainer.stages.corpus.sources import SourceFile

_ROWS_AT_ONCE = 1024


def read_parquet(path: Path, file: SourceFile) -> Iterator[Record]:
    """One record per row. Null is an empty text."""
    try:
        yield from _rows(path, file)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file.address}: cannot be read as Parquet: {reason}; copy or write the file again") from error


def _rows(path: Path, file: SourceFile) -> Iterator[Record]:
    number = 0
    with pq.ParquetFile(path) as table:
        columns = _columns(table.schema_arrow, file)
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield Record(number=number, text=row[file.text_field] or "", url=row.get("url"))


def _columns(schema: pa.Schema, file: SourceFile) -> list[str]:
    """The text column, and ``url`` if there is one."""
    if file.text_field not in schema.names:
        raise UserError(
            f"{file.address}: no column {file.text_field!r}; the file has {', '.join(schema.names)}: "
            "set the source's textField to the one that holds the text"
        )
    if not _is_text(schema.field(file.text_field).type):
        raise UserError(
            f"{file.address}: column {file.text_field!r} holds {schema.field(file.text_field).type}, not text; "
            "set the source's textField to the one that holds the text"
        )
    has_url = "url" in schema.names and _is_text(schema.field("url").type) and file.text_field != "url"
    return [file.text_field, "url"] if has_url else [file.text_field]


def _is_text(type_: pa.DataType) -> bool:
    value = type_.value_type if pa.types.is_dictionary(type_) else type_
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value))
