"""Which files an address names, in one fixed order, and a path on this machine for each.

In: a file, a folder, an S3 prefix, or a pattern with ``*``, ``?`` and ``[...]``. Out: ``StoredFile`` values by name. Next:
``opening`` decompresses them.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from headrace_api.run import Storage
from headrace_trainer.errors import UserError
from headrace_trainer.storage import ObjectInfo, open_uri

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file below an address."""

    root: str
    """The URI that ``key`` is relative to."""
    key: str
    bytes: int

    @property
    def address(self) -> str:
        """The file's name for people."""
        return f"{self.root.rstrip('/')}/{self.key}"


def suffix_of(name: str) -> str:
    """The last suffix of a file's name in lower case, looking through those of compression; empty where there is none."""
    suffixes = [s for s in PurePosixPath(name.lower()).suffixes if s not in COMPRESSIONS]
    return suffixes[-1] if suffixes else ""


def list_files(uri: str, storage: Storage, *, field: str) -> list[StoredFile]:
    """The files that ``uri`` names, by name.

    Args:
        uri: a file, a folder, an S3 prefix or a pattern. An address that exists as it is written is not a pattern.
        storage: names the S3 endpoint and region.
        field: what the manifest calls the address, for errors.

    Raises:
        UserError: no file is there.
    """
    root, objects = _listing(uri, storage)
    if not objects and _WILD.search(uri):
        root, objects = _matching(uri, storage)
    visible = sorted((o for o in objects if not _is_hidden(o.key)), key=lambda o: o.key)
    if not visible:
        raise UserError(
            f"{field}: {uri!r}: no file, and no folder with files; "
            "check the address (names that start with . or _ are ignored)"
        )
    return [StoredFile(root=root, key=o.key, bytes=o.bytes) for o in visible]


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


def _matching(uri: str, storage: Storage) -> tuple[str, list[ObjectInfo]]:
    """The folder above the first part with a wild card, and the objects below it that match the rest."""
    parts = uri.split("/")
    first = next(i for i, part in enumerate(parts) if _WILD.search(part))
    root = "/".join(parts[:first]) or ("/" if uri.startswith("/") else ".")
    if root in ("s3:/", "s3://"):  # the bucket itself is never a pattern
        return uri, []
    pattern = "/".join(parts[first:])
    wild = re.compile(_as_regex(pattern))
    certain = pattern[: _WILD.search(pattern).start()]  # type: ignore[union-attr]
    return root, [o for o in open_uri(root, storage).list(certain) if wild.fullmatch(o.key)]


_PIECES = re.compile(r"\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]/]*\]|.", re.DOTALL)


def _as_regex(pattern: str) -> str:
    """A shell pattern as a regular expression: ``*`` and ``?`` stay inside a folder, ``**`` does not."""
    return "".join(_as_regex_piece(piece) for piece in _PIECES.findall(pattern))


def _as_regex_piece(piece: str) -> str:
    simple = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    if piece in simple:
        return simple[piece]
    if piece.startswith("[") and len(piece) > 1:
        inside = piece[1:-1]
        negated, inside = ("^", inside[1:]) if inside[0] in "!^" else ("", inside)
        return f"[{negated}{inside.translate({ord(c): chr(92) + c for c in '[]^&|~' + chr(92)})}]"
    return re.escape(piece)


def _is_hidden(key: str) -> bool:
    """Marker files such as ``_SUCCESS`` and ``.DS_Store``, and anything in folders named like them."""
    return any(part.startswith((".", "_")) for part in PurePosixPath(key).parts)


@contextmanager
def local_copy(file: StoredFile, storage: Storage, *, scratch: Path) -> Iterator[Path]:
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
