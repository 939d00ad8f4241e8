"""Open files, possibly compressed, such that reading a damaged one anywhere raises an error that names it.

In: a path. Out: a buffered binary stream of the decompressed content.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from headrace_trainer.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BUFFER_BYTES = 1 << 20
_DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda raw: pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"),
}


def _decompressed(raw: IO[bytes], *, suffix: str) -> Any:
    return _DECOMPRESSORS[suffix](raw) if suffix in _DECOMPRESSORS else raw


class _Checked(io.RawIOBase):
    """Turns every decompression failure into a ``UserError``.

    warcio takes an ``EOFError`` for the end of the archive, so a truncated file would pass as complete.
    """

    def __init__(self, path: Path, address: str) -> None:
        self._raw = path.open("rb")
        self._stream = _decompressed(self._raw, suffix=path.suffix.lower())
        self._address = address

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer", /) -> int:
        view = memoryview(buffer)
        try:
            data = self._stream.read(len(view))
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise UserError(
                f"{self._address}: truncated or corrupt near byte {self._raw.tell()}: {error}; copy the file again"
            ) from error
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._raw.close()
        super().close()


def open_bytes(path: Path, address: str) -> io.BufferedReader:
    """Open a file and decompress it according to its suffix.

    Args:
        path: a local file.
        address: its name in error messages.

    Raises:
        UserError: from any later read, if the file is damaged.
    """
    return io.BufferedReader(_Checked(path, address), buffer_size=_BUFFER_BYTES)


def decode_utf8(data: bytes, address: str, *, first_line: int = 1, first_byte: int = 0) -> str:
    """Decode ``data``, dropping a byte-order mark.

    Args:
        data: a file or a line of one.
        address: the file's name in error messages.
        first_line: line number of the start of ``data``.
        first_byte: offset of ``data`` in the decompressed file.

    Raises:
        UserError: names the line and the byte offset of the first bad byte.
    """
    try:
        return data.decode("utf-8-sig" if first_byte == 0 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UserError(
            f"{address}:{line}: byte {first_byte + error.start} is not valid UTF-8 ({error.reason}); "
            f"convert the file, for example with iconv -t UTF-8, or remove it"
        ) from error
