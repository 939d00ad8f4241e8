"""What the finders return, and a limit on how much of it is used."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

_FULL = 0.98

Content = TypeVar("Content", str, bytes)


@dataclass(frozen=True, kw_only=True)
class Found(Generic[Content]):
    """A text or page, with its name."""

    name: str
    """Unique within its kind: a qualified name, or a path below a well-known folder."""
    content: Content


def up_to(found: Iterable[Found[Content]], *, max_bytes: int) -> Iterator[Found[Content]]:
    """The items that fit into ``max_bytes``, until it is nearly full. One that does not fit is skipped."""
    taken = 0
    for item in found:
        if taken >= _FULL * max_bytes:
            return
        size = len(item.content) if isinstance(item.content, bytes) else len(item.content.encode())
        if taken + size <= max_bytes:
            taken += size
            yield item


def clean_text(data: bytes) -> str | None:
    """UTF-8 text with plain line ends; None for anything else, or if only white space remains."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\n").replace("\f", "\n").strip()
    return text if text and "\0" not in text else None
