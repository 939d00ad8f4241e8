"""The rows of one file, good and bad: JSON lines or Parquet -> ``Row`` values with their numbers.

A bad line costs itself. A block of a Parquet file that cannot be read costs the rows that it has, which the file's
footer knows. Of a compressed file that is cut short nobody knows what is lost: that is an error, whatever the budget.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from headrace_api.stages.data import RecordFormat
from headrace_trainer.errors import UserError
from headrace_trainer.formats.opening import open_bytes
from headrace_trainer.formats.records.bad import BadRecord, Place, Reason
from headrace_trainer.formats.records.shapes import Row

MAX_LINE_BYTES = 64 << 20
"""A longer line is no record: one file of 100 GB without a line break must not fill the memory."""

_ROWS_AT_ONCE = 256

NumberedRow = tuple[Place, Row]


def read_rows(
    path: Path, format: RecordFormat, *, address: str, columns: Callable[[list[str]], list[str]]
) -> Iterator[NumberedRow | BadRecord]:
    """The rows of a file in its order.

    Args:
        path: the file on this machine.
        format: how it is read.
        address: what people call it.
        columns: which of a Parquet file's columns are wanted. JSON lines give them all.

    Raises:
        UserError: the file is cut short, corrupt, or not of its format.
    """
    if format is RecordFormat.JSONL:
        return _read_jsonl(path, address)
    return _read_parquet(path, address, columns)


def _read_jsonl(path: Path, address: str) -> Iterator[NumberedRow | BadRecord]:
    with open_bytes(path, address) as stream:
        for number, line in enumerate(_lines(stream), start=1):
            place = Place(file=address, number=number)
            if line is None:
                detail = f"a line of more than {MAX_LINE_BYTES >> 20} MiB"
                yield BadRecord(place=place, reason=Reason.TOO_LARGE, detail=detail)
            elif stripped := line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
                yield _parse(stripped, place)


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """The lines of a stream; None for one that is too long, which is passed over without being held."""
    while line := stream.readline(MAX_LINE_BYTES):
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while rest := stream.readline(MAX_LINE_BYTES):
            if rest.endswith(b"\n"):
                break
        yield None


def _parse(line: bytes, place: Place) -> NumberedRow | BadRecord:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        reason = Reason.NOT_JSON if _is_utf8(line) else Reason.NOT_UTF8
        return BadRecord(place=place, reason=reason, detail=f"{error.msg} at column {error.colno}")
    if not isinstance(value, dict):
        return BadRecord(place=place, reason=Reason.NOT_JSON, detail=f"a JSON {type(value).__name__}, not an object")
    return place, value


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_parquet(
    path: Path, address: str, columns: Callable[[list[str]], list[str]]
) -> Iterator[NumberedRow | BadRecord]:
    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{address}: cannot be read as Parquet: {reason}; copy or write the file again") from error
    with table:
        wanted = columns(table.schema_arrow.names)
        first = 1
        for group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(group).num_rows
            yield from _read_group(table, group, wanted, address, first=first, num_rows=num_rows)
            first += num_rows


def _read_group(
    table: pq.ParquetFile, group: int, columns: list[str], address: str, *, first: int, num_rows: int
) -> Iterator[NumberedRow | BadRecord]:
    """The rows of a row group; from the first that cannot be read on, they are lost together."""
    done = 0
    batches = table.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=columns)
    while done < num_rows:
        try:
            batch = next(batches)
        # pyarrow raises OSError for a bad page, ArrowException for a bad type, and others where a page lies.
        except Exception as error:
            yield BadRecord(
                place=Place(file=address, number=first + done),
                reason=Reason.UNREADABLE,
                detail=f"row group {group}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                records=num_rows - done,
            )
            return
        yield from _rows(batch, address, first=first + done)
        done += batch.num_rows


def _rows(batch: pa.RecordBatch, address: str, *, first: int) -> Iterator[NumberedRow | BadRecord]:
    columns = [_values(column) for column in batch.columns]
    for i in range(batch.num_rows):
        place = Place(file=address, number=first + i)
        try:
            yield place, {n: _without_nulls(v(i)) for n, v in zip(batch.schema.names, columns, strict=True)}
        except UnicodeDecodeError as error:
            yield BadRecord(place=place, reason=Reason.NOT_UTF8, detail=str(error))


def _values(column: pa.Array) -> Callable[[int], Any]:
    """Position -> value. All at once where that works: one by one is several times slower."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        return lambda i: column[i].as_py()
    return values.__getitem__


def _without_nulls(value: Any) -> Any:
    """The value without the keys that Arrow adds to an object because another row's object has them."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
