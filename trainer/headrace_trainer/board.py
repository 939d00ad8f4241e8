"""The board: shared memory with a slot per rank, in which ranks show their agent that they are alive, and their
outcome.

A rank writes its progress (``report``), signs of life (``beat``) and its outcome (``say``); the agent reads. Nothing is
sent or written to disk, so a full or hung disk neither blocks a rank nor hides how it ended.
"""

import mmap
import os
import struct
import zlib
from pathlib import Path

BOARD_VARIABLE = "HEADRACE_BOARD"
"""The environment variable with the board's path. If unset, ranks report nothing."""
_TEXT_BYTES = 32 * 1024
_COUNTS = struct.Struct("<QQ")
_TEXT = struct.Struct("<II")
_SLOT_BYTES = mmap.PAGESIZE * -(-(_COUNTS.size + 2 * (_TEXT.size + _TEXT_BYTES)) // mmap.PAGESIZE)
_PROGRESS_AT = _COUNTS.size
_WORDS_AT = _PROGRESS_AT + _TEXT.size + _TEXT_BYTES


class Slot:
    """One rank's part of the board. Only that rank writes it."""

    def __init__(self, memory: mmap.mmap, index: int) -> None:
        self._memory, self._at = memory, index * _SLOT_BYTES

    def report(self, progress: str) -> None:
        """Publish progress: a new phase, or another finished unit."""
        self._write(_PROGRESS_AT, progress)
        beats, reports = self.counts
        self._count(beats + 1, reports + 1)

    def beat(self) -> None:
        """Show that this rank is making progress within what it last reported."""
        beats, reports = self.counts
        self._count(beats + 1, reports)

    def say(self, words: str) -> None:
        """Leave this rank's outcome."""
        self._write(_WORDS_AT, words)

    @property
    def counts(self) -> tuple[int, int]:
        """The number of beats (reports included), and of reports."""
        beats, reports = _COUNTS.unpack_from(self._memory, self._at)
        return beats, reports

    @property
    def progress(self) -> str | None:
        """The newest report; None before the first, or while one is being written."""
        return self._read(_PROGRESS_AT)

    @property
    def words(self) -> str | None:
        """The outcome; None if there is none."""
        return self._read(_WORDS_AT)

    def _count(self, beats: int, reports: int) -> None:
        _COUNTS.pack_into(self._memory, self._at, beats, reports)

    def _write(self, offset: int, text: str) -> None:
        data, at = text.encode(), self._at + offset
        if len(data) > _TEXT_BYTES:
            raise ValueError(f"{len(data)} bytes exceed the slot's {_TEXT_BYTES}")
        self._memory[at + _TEXT.size : at + _TEXT.size + len(data)] = data
        _TEXT.pack_into(self._memory, at, len(data), zlib.crc32(data))

    def _read(self, offset: int) -> str | None:
        at = self._at + offset
        length, checksum = _TEXT.unpack_from(self._memory, at)
        data = self._memory[at + _TEXT.size : at + _TEXT.size + min(length, _TEXT_BYTES)]
        return data.decode() if length and zlib.crc32(data) == checksum else None


class Board:
    """The slots of a pod's ranks, by local rank.

    Attributes:
        fd: the memory's file descriptor, for processes that inherit it.
    """

    def __init__(self, fd: int, *, ranks: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, ranks * _SLOT_BYTES)
        self.slots = tuple(Slot(self._memory, i) for i in range(ranks))

    @classmethod
    def create(cls, ranks: int) -> "Board":
        """Create an empty board. It lasts as long as any process has it open."""
        fd = os.memfd_create("headrace-board")
        os.ftruncate(fd, ranks * _SLOT_BYTES)
        return cls(fd, ranks=ranks)


class Counter:
    """The beats of a helper process, in memory shared with its rank. Create it before the fork."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def beat(self) -> None:
        """Show that this process is making progress."""
        _COUNTS.pack_into(self._memory, 0, self.beats + 1, 0)

    @property
    def beats(self) -> int:
        """The number of beats."""
        beats: int = _COUNTS.unpack_from(self._memory, 0)[0]
        return beats


_mine: Slot | Counter | None = None


def take_slot(local_rank: int) -> Slot | None:
    """Take a slot of the board named in the environment for this process; None if there is no board."""
    global _mine
    path = os.environ.get(BOARD_VARIABLE)
    if path is None:
        return None
    with Path(path).open("r+b") as file:
        ranks = os.fstat(file.fileno()).st_size // _SLOT_BYTES
        _mine = Slot(mmap.mmap(file.fileno(), ranks * _SLOT_BYTES), local_rank)
    return _mine


def beat_on(counter: Counter) -> None:
    """Use a counter instead of the slot. For a helper forked from a rank: it must not vouch for the rank itself."""
    global _mine
    _mine = counter


def beat() -> None:
    """Show that this rank is making progress, from wherever it happens: a file was stored, bytes arrived.

    Never call it from a timer: beating while the work stands still would hide a hang.
    """
    if _mine is not None:
        _mine.beat()
