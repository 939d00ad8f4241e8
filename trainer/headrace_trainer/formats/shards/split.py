"""Assigns documents to training or validation by their text alone.

So equal texts land on the same side in every run, wherever they occur in the corpus.
"""

import hashlib
from enum import StrEnum


class Split(StrEnum):
    """What a document is used for."""

    TRAIN = "train"
    VALIDATION = "validation"


def split_of(text: str, *, validation_ratio: float) -> Split:
    """The split that ``text`` belongs to."""
    uniform = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
    return Split.VALIDATION if uniform < validation_ratio else Split.TRAIN
