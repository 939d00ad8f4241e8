"""List the files of a corpus' sources, in a fixed order, and how to read each.

In: the manifest's ``sources``. Out: ``SourceFile`` values and, for each, a local path for ``readers``.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from headrace_api.run import Storage
from headrace_api.stages.corpus import Format, Source
from headrace_trainer.errors import UserError
from headrace_trainer.storage import ObjectInfo, open_uri

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
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
class SourceFile:
    """One file of one source."""

    source: int
    """Index of its source in the manifest."""
    root: str
    """The URI that ``key`` is relative to."""
    key: str
    format: Format
    text_field: str
    bytes: int

    @property
    def address(self) -> str:
        """The file's name for people."""
        return f"{self.root.rstrip('/')}/{self.key}"


def format_of(name: str) -> Format:
    """The format implied by a file's name: compression suffixes are ignored; unknown ones mean text."""
    suffixes = [s for s in PurePosixPath(name.lower()).suffixes if s not in COMPRESSIONS]
    return _FORMATS.get(suffixes[-1], Format.TEXT) if suffixes else Format.TEXT


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
    root, objects = _listing(source.uri, storage)
    visible = [o for o in objects if not _is_hidden(o.key)]
    if not visible:
        raise UserError(
            f"corpus.sources[{index}].uri: {source.uri!r}: no file, and no folder with files; "
            "check the address (names that start with . or _ are ignored)"
        )
    return [
        SourceFile(
            source=index,
            root=root,
            key=found.key,
            format=format_of(found.key) if source.format is Format.AUTO else source.format,
            text_field=source.text_field,
            bytes=found.bytes,
        )
        for found in sorted(visible, key=lambda o: o.key)
    ]


def _listing(uri: str, storage: Storage) -> tuple[str, list[ObjectInfo]]:
    """A root and the objects below it: ``uri`` as a folder, else its parent with just the file that ``uri`` names."""
    objects = open_uri(uri, storage).list()
    if objects:
        return uri, objects
    parent, _, name = uri.rstrip("/").rpartition("/")
    in_bucket = not uri.startswith("s3://") or parent.count("/") >= 2
    if not name or not in_bucket:
        return uri, []
    parent = parent or ("/" if uri.startswith("/") else ".")
    return parent, [o for o in open_uri(parent, storage).list(name) if o.key == name]


def _is_hidden(key: str) -> bool:
    """Marker files such as ``_SUCCESS`` and ``.DS_Store``, and anything in folders named like them."""
    return any(part.startswith((".", "_")) for part in PurePosixPath(key).parts)


@contextmanager
def local_copy(file: SourceFile, storage: Storage, *, scratch: Path) -> Iterator[Path]:
    """The file's local path. A file in S3 is copied to ``scratch``, and removed afterwards."""
    store = open_uri(file.root, storage)
    path = store.local_path(file.key)
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        copy = Path(folder) / PurePosixPath(file.key).name
        store.get_file(file.key, copy)
        yield copy
