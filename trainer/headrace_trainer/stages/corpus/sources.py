"""List the files of a corpus' sources, in a fixed order, and how to read each.

In: the ``sources`` of a manifest. Out: ``SourceFile`` values, for ``readers``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from headrace_api.run import Storage
from headrace_api.stages.corpus import Format, Source
from headrace_trainer.formats.files import StoredFile, list_files, suffix_of

_FORMATS = {
    ".warc": Format.WARC,
    ".wet": Format.WET,
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    # Public corpora use .json for JSON lines. A single JSON value spread over lines fails loudly at its first line.
    ".json": Format.JSONL,
    ".parquet": Format.PARQUET,
    ".html": Format.HTML,
    ".htm": Format.HTML,
    ".xhtml": Format.HTML,
}


@dataclass(frozen=True, kw_only=True)
class SourceFile(StoredFile):
    """One file of one source."""

    source: int
    """The position of its source in the manifest."""
    format: Format
    text_field: str


def format_of(name: str) -> Format:
    """How a file is read, by its name: compression suffixes are looked through, unknown ones mean text."""
    return _FORMATS.get(suffix_of(name), Format.TEXT)


def find_files(sources: Sequence[Source], storage: Storage) -> list[SourceFile]:
    """Every file of every source: sources in the manifest's order, files by name.

    Args:
        sources: the manifest's list.
        storage: the S3 endpoint and region.

    Raises:
        UserError: a source has no files.
    """
    return [file for i, source in enumerate(sources) for file in _files_of(i, source, storage)]


def _files_of(index: int, source: Source, storage: Storage) -> list[SourceFile]:
    return [
        SourceFile(
            source=index,
            root=found.root,
            key=found.key,
            format=format_of(found.key) if source.format is Format.AUTO else source.format,
            text_field=source.text_field,
            bytes=found.bytes,
        )
        for found in list_files(source.uri, storage, field=f"corpus.sources[{index}].uri")
    ]
