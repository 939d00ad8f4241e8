"""What all readers return."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Record:
    """One text as read."""

    number: int
    """Line, row or record number in its file, from 1."""
    text: str
    url: str | None = None
