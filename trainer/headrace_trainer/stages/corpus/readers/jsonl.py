"""JSON lines: one object per line, with its text under ``textField``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from headrace_trainer.errors import UserError
from headrace_trainer.formats.opening import decode_utf8, open_bytes
from headrace_trainer.stages.corpus.readers.record import Record
from headrace_trainer.stages.corpus.sources import SourceFile


def read_jsonl(path: Path, file: SourceFile) -> Iterator[Record]:
    """One record per line. Blank lines are skipped; null is an empty text."""
    offset = 0
    with open_bytes(path, file.address) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                text = decode_utf8(line, file.address, first_line=number, first_byte=offset)
                yield _record(text, number=number, file=file)
            offset += len(line)


def _record(line: str, *, number: int, file: SourceFile) -> Record:
    value = _parse(line, place=f"{file.address}:{number}")
    if file.text_field not in value:
        raise UserError(
            f"{file.address}:{number}: no field {file.text_field!r}; this line has {', '.join(sorted(value)) or 'none'}: "
            f"set the source's textField to the one that holds the text"
        )
    text, url = value[file.text_field], value.get("url")
    if not isinstance(text, str | None):
        raise UserError(
            f"{file.address}:{number}: field {file.text_field!r} holds {type(text).__name__}, not text; "
            "set the source's textField to the one that holds the text"
        )
    return Record(number=number, text=text or "", url=url if isinstance(url, str) else None)


def _parse(line: str, *, place: str) -> dict[str, Any]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(
            f"{place}: not valid JSON: {error.msg} at column {error.colno}; "
            "each line must be one whole JSON object: fix or remove the line"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: a JSON {type(value).__name__}, not an object; each line must be one JSON object")
    return value
