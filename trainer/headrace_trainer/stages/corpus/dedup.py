"""Exact deduplication: the first of several equal texts stays.

Texts are equal when they differ only in Unicode form, letter case and white space: copies of a page on two servers
differ in those, and a second one teaches nothing.
"""

import hashlib
import unicodedata

DIGEST_BYTES = 16
"""128 bits: among 10^12 documents two different ones meet with probability 10^-15."""


def text_digest(text: str) -> bytes:
    """What two texts share exactly when they are equal: NFC, case-folded, runs of white space as one space."""
    normal = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return hashlib.blake2b(" ".join(normal.split()).encode(), digest_size=DIGEST_BYTES).digest()


class SeenTexts:
    """The digests so far; about 100 bytes of memory a document."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def is_new(self, digest: bytes) -> bool:
        """Whether ``digest`` was not given before."""
        before = len(self._digests)
        self._digests.add(digest)
        return len(self._digests) > before
