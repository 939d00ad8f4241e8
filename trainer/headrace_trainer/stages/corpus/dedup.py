"""Exact deduplication: keep the first of several equal texts.

Texts that differ only in Unicode normalization, letter case and white space count as equal: copies of a page on two
servers differ in these, and the second copy teaches nothing.
"""

import hashlib
import unicodedata

DIGEST_BYTES = 16
"""128 bits: a collision among 10^12 documents has probability 10^-15."""


def text_digest(text: str) -> bytes:
    """Equal exactly for equal texts: NFC, case-folded, runs of white space collapsed."""
    normal = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return hashlib.blake2b(" ".join(normal.split()).encode(), digest_size=DIGEST_BYTES).digest()


class SeenTexts:
    """The digests seen so far; about 100 bytes of memory per document."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def is_new(self, digest: bytes) -> bool:
        """Whether ``digest`` is new; remembers it."""
        before = len(self._digests)
        self._digests.add(digest)
        return len(self._digests) > before
