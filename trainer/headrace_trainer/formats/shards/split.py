"""Which documents are kept for validation: decided by the text alone.

So the same text is on the same side in every run, wherever it stands in the corpus, and copies of it too.
"""

import hashlib
from enum import StrEnum


class Split(StrEnum):
    """What a document is for."""

    TRAIN = "train"
    VALIDATION = "validation"


def split_of(text: str, *, validation_ratio: float) -> Split:
    """The side that ``text`` is on."""
    uniform = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
    return Split.VALIDATION if uniform < validation_ratio else Split.TRAIN
