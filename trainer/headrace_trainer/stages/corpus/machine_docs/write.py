"""Write what was found to files in four formats. Equal input gives equal bytes.

In: ``Found`` values. Out: files in one folder per format, and a ``Written`` for each.
"""

import gzip
import io
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from headrace_trainer.stages.corpus.machine_docs.found import Found

# Several files per format, so that several processes can read them.
_DOCSTRINGS_A_FILE = 10_000
_PAGES_A_FILE = 100
_SITE = "http://localhost/doc/"


@dataclass(frozen=True, kw_only=True)
class Written:
    """The contents of a format's folder."""

    format: str
    files: int
    documents: int
    bytes: int
    """Size of the texts or pages before compression."""

    def as_json(self) -> dict[str, str | int]:
        return asdict(self)


def write_jsonl(folder: Path, found: Iterable[Found[str]]) -> Written:
    """Gzip-compressed JSON lines with ``name`` and ``text``."""
    iterator, files, documents, size = iter(found), 0, 0, 0
    while batch := list(islice(iterator, _DOCSTRINGS_A_FILE)):
        lines = b"".join(orjson.dumps({"name": f.name, "text": f.content}) + b"\n" for f in batch)
        (folder / f"docstrings-{files:02d}.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
        files, documents, size = files + 1, documents + len(batch), size + _text_bytes(batch)
    return Written(format="jsonl", files=files, documents=documents, bytes=size)


def write_parquet(folder: Path, found: Iterable[Found[str]]) -> Written:
    """One Parquet file with the columns ``name`` and ``text``."""
    rows = list(found)
    table = pa.table({"name": [f.name for f in rows], "text": [f.content for f in rows]})
    pq.write_table(table, folder / "readmes.parquet", row_group_size=1000)
    return Written(format="parquet", files=1, documents=len(rows), bytes=_text_bytes(rows))


def write_text(folder: Path, found: Iterable[Found[str]]) -> Written:
    """One text file per text."""
    rows = list(found)
    for item in rows:
        path = folder / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(item.content + "\n", encoding="utf-8")
    return Written(format="text", files=len(rows), documents=len(rows), bytes=_text_bytes(rows))


def write_warc(folder: Path, found: Iterable[Found[bytes]]) -> Written:
    """WARC files of responses, as if a crawler had fetched this machine's pages."""
    iterator, files, documents, size = iter(found), 0, 0, 0
    while batch := list(islice(iterator, _PAGES_A_FILE)):
        with (folder / f"pages-{files:02d}.warc.gz").open("wb") as file:
            writer = WARCWriter(file, gzip=True)
            for page in batch:
                _write_response(writer, page)
        files, documents, size = files + 1, documents + len(batch), size + sum(len(p.content) for p in batch)
    return Written(format="warc", files=files, documents=documents, bytes=size)


def _write_response(writer: WARCWriter, page: Found[bytes]) -> None:
    url = _SITE + page.name
    # The defaults, current date and random id, would make the bytes differ every time.
    fixed = {"WARC-Date": "2000-01-01T00:00:00Z", "WARC-Record-ID": f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, url)}>"}
    headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
    record = writer.create_warc_record(
        url, "response", payload=io.BytesIO(page.content), http_headers=headers, warc_headers_dict=fixed
    )
    writer.write_record(record)


def _text_bytes(found: Iterable[Found[str]]) -> int:
    return sum(len(item.content.encode()) for item in found)
