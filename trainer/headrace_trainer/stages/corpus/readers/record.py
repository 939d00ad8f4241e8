"""What every reader gives."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Record:
    """One text as a reader found it."""

    number: int
    """Where it is in its file: line, row or record, from 1."""
    text: str
    url: str | None = None
