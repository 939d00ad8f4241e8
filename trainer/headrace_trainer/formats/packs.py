"""What post-training reads: documents with the tokens that are trained on, and packs of them.

A pack is one micro-batch: its documents are laid end to end in one row, and none sees another.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Document:
    """One conversation, completion or text."""

    tokens: np.ndarray
    """int64 [n]."""
    mask: np.ndarray
    """bool [n]: whether each token is trained on, as a label."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Documents that fill a row, as far as they go."""

    documents: tuple[Document, ...]
