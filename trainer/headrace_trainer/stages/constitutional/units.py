"""Finished units of prompts in storage, so that a stage that was killed repeats one of them at most.

In: the transcripts of a unit. Out: their rows, in order, from whichever attempt. A unit is stored whole with its digest;
one that is damaged is made again. The artifact replaces them all.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import orjson

from headrace_trainer import board
from headrace_trainer.errors import StorageError
from headrace_trainer.stages.constitutional.transcripts import Row, as_line
from headrace_trainer.storage import ObjectStore


@dataclass(frozen=True, kw_only=True)
class Span:
    """The prompts of a unit."""

    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first


def spans(total: int, *, size: int) -> list[Span]:
    """All units of a stage."""
    return [Span(first=first, end=min(total, first + size)) for first in range(0, total, size)]


class KeptUnits:
    """The units of one stage with one configuration, one seed and one set of inputs.

    Args:
        store: of the run.
        stage: its name.
        identity: digest of all that a transcript depends on.
    """

    def __init__(self, store: ObjectStore, *, stage: str, identity: str) -> None:
        self._store, self._folder = store, f"{stage}/units/{identity[:32]}"

    def found(self, units: Sequence[Span]) -> Iterator[tuple[Span, list[Row]]]:
        """Those that are there and whole."""
        keys = {info.key for info in self._store.list(f"{self._folder}/")}
        for unit in units:
            if self._key(unit) in keys and (rows := self._read(unit)) is not None:
                board.beat()
                yield unit, rows

    def keep(self, unit: Span, rows: Sequence[Row]) -> None:
        """Store a finished unit."""
        data = b"".join(as_line(row) for row in rows)
        self._store.put_bytes(self._key(unit), hashlib.sha256(data).hexdigest().encode() + b"\n" + data)

    def rows(self, units: Sequence[Span]) -> Iterator[Row]:
        """Every row of all units, in order.

        Raises:
            StorageError: one is gone or damaged.
        """
        for unit in units:
            rows = self._read(unit)
            if rows is None:
                raise StorageError(f"{self._store.uri}/{self._key(unit)}: damaged since it was written: start again")
            board.beat()
            yield from rows

    def _read(self, unit: Span) -> list[Row] | None:
        digest, _, data = self._store.get_bytes(self._key(unit)).partition(b"\n")
        if hashlib.sha256(data).hexdigest().encode() != digest:
            return None
        rows = [orjson.loads(line) for line in data.splitlines()]
        return rows if len(rows) == len(unit) else None

    def _key(self, unit: Span) -> str:
        return f"{self._folder}/{unit.first:08d}-{unit.end:08d}.jsonl"
