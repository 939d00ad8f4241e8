"""Web archives (ISO 28500): HTML pages from WARC files, extracted texts from Common Crawl's WET files.

Records that are not documents (requests, metadata, redirects, images) are skipped. A record shorter than its header
promises is an error: crawls are often copied incompletely, and warcio would silently return what is there.
"""

from collections.abc import Iterator
from pathlib import Path

from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed
from warcio.recordloader import ArcWarcRecord

from headrace_trainer.errors import UserError
from headrace_trainer.formats.opening import decode_utf8, open_bytes
from headrace_trainer.stages.corpus.readers.html import main_text
from headrace_trainer.stages.corpus.readers.record import Record
from headrace_trainer.stages.corpus.sources import SourceFile

_HTML_TYPES = ("text/html", "application/xhtml+xml")


def read_warc(path: Path, file: SourceFile) -> Iterator[Record]:
    """One record per HTML page that the server answered with status 200."""
    for number, record, content in _whole_records(path, file):
        if _is_page(record):
            yield Record(number=number, text=main_text(content), url=_url(record))


def read_wet(path: Path, file: SourceFile) -> Iterator[Record]:
    """One record per text that the crawler extracted."""
    for number, record, content in _whole_records(path, file):
        if record.rec_type == "conversion":
            text = decode_utf8(content, f"{file.address} record {number}")
            yield Record(number=number, text=text, url=_url(record))


def _whole_records(path: Path, file: SourceFile) -> Iterator[tuple[int, ArcWarcRecord, bytes]]:
    with open_bytes(path, file.address) as stream:
        archive = ArchiveIterator(stream)
        number = 0
        while (record := _next_record(archive, file, number=number + 1)) is not None:
            number += 1
            content = record.content_stream().read()
            _check_whole(record, archive, place=f"{file.address}: record {number}")
            yield number, record, content


def _next_record(archive: ArchiveIterator, file: SourceFile, *, number: int) -> ArcWarcRecord | None:
    try:
        return next(archive, None)
    # AttributeError: warcio accesses headers that truncation left empty.
    except (ArchiveLoadFailed, AttributeError) as error:
        raise UserError(
            f"{file.address}: record {number}, at byte {archive.offset} of the decompressed file, has no whole header: "
            "the file is truncated or not a WARC file; copy it again, or set the source's format"
        ) from error


def _check_whole(record: ArcWarcRecord, archive: ArchiveIterator, *, place: str) -> None:
    while record.raw_stream.read(1 << 16):
        pass  # a page may end before its record does
    missing = record.raw_stream.limit
    if missing:
        raise UserError(
            f"{place}, at byte {archive.offset} of the decompressed file, ends {missing} bytes early: "
            "the file is truncated; copy it again"
        )


def _is_page(record: ArcWarcRecord) -> bool:
    headers = record.http_headers
    if record.rec_type != "response" or headers is None or headers.get_statuscode() != "200":
        return False
    return (headers.get_header("Content-Type") or "").lower().startswith(_HTML_TYPES)


def _url(record: ArcWarcRecord) -> str | None:
    value = record.rec_headers.get_header("WARC-Target-URI")
    return None if value is None else str(value)
