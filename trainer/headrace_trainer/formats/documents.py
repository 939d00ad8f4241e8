"""The corpus artifact: gzip-compressed JSON lines of documents, with ``report.json``.

``DocumentWriter`` writes it, ``read_documents`` reads it; the ``tokenizer`` and ``shards`` stages use it.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

REPORT_FILE = "report.json"
_PATTERN = "documents-*.jsonl.gz"
_FILE_BYTES = 1 << 28
_COMPRESSION_LEVEL = 6


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document of the corpus."""

    id: str
    """Its origin: the file below its source, and the record's number."""
    text: str
    source: str
    """The source's URI, as in the manifest."""
    language: str
    """ISO 639 code."""
    url: str | None = None


def encode_document(document: Document) -> bytes:
    """The document as one JSON line, without newline."""
    fields: dict[str, Any] = {
        "id": document.id,
        "text": document.text,
        "source": document.source,
        "language": document.language,
    }
    return orjson.dumps(fields | ({} if document.url is None else {"url": document.url}))


def read_documents(folder: Path) -> Iterator[Document]:
    """Every document of a corpus artifact, in order."""
    for path in sorted(folder.glob(_PATTERN)):
        with gzip.open(path, "rb") as lines:
            for line in lines:
                yield Document(**orjson.loads(line))


def read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / REPORT_FILE).read_text())
    return report


class DocumentWriter:
    """Writes documents, a new file every 256 MiB of JSON. Equal documents give equal bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_files = 0
        self._written = 0
        self._file: gzip.GzipFile | None = None

    def write(self, line: bytes) -> None:
        """Add a document encoded by ``encode_document``."""
        if self._file is None or self._written >= _FILE_BYTES:
            self._begin()
        assert self._file is not None
        self._file.write(line + b"\n")
        self._written += len(line) + 1

    def _begin(self) -> None:
        self.close()
        path = self._folder / f"documents-{self._num_files:05d}.jsonl.gz"
        # No timestamp in the header: it would make equal corpora differ.
        self._file = gzip.GzipFile(path, "wb", compresslevel=_COMPRESSION_LEVEL, mtime=0)
        self._num_files, self._written = self._num_files + 1, 0

    def close(self) -> None:
        """Finish the open file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
