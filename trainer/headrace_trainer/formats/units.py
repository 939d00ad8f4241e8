"""Units of documents on a disk: tokens and masks of a data set of any size, read by every rank through a memory map.

``UnitWriter`` makes a folder of it, ``Units`` reads it: a unit by its number, the lengths of all of them, and a ``Pack`` by
the units that ``PackOrder`` puts into it.
"""

import functools
import hashlib
from array import array
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from headrace_trainer.formats.packs import Document, Pack, Unit

TOKENS_FILE, MASK_FILE, NOTES_FILE, INDEX_FILE = "tokens.bin", "mask.bin", "notes.bin", "index.npz"
_NO_LABEL = -1


class UnitWriter:
    """Writes units one after the other. The index comes last: a folder without one is not complete."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._tokens, self._mask = (folder / TOKENS_FILE).open("wb"), (folder / MASK_FILE).open("wb")
        self._notes, self._note_lengths = (folder / NOTES_FILE).open("wb"), array("q")
        self._sizes, self._lengths = array("b"), array("q")
        self._labels, self._margins = array("b"), array("d")

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, unit: Unit, note: bytes = b"") -> None:
        """Append a unit, and what else is to be known of it."""
        self._notes.write(note)
        self._note_lengths.append(len(note))
        self._sizes.append(len(unit))
        for document in unit:
            self._tokens.write(document.tokens.astype("<i4").tobytes())
            self._mask.write(document.mask.astype("u1").tobytes())
            self._lengths.append(len(document))
            self._labels.append(_NO_LABEL if document.label is None else int(document.label))
            self._margins.append(float("nan") if document.margin is None else document.margin)

    def close(self) -> None:
        """Write the index."""
        self._close_files()
        np.savez(
            self._folder / INDEX_FILE,
            sizes=np.array(self._sizes),
            lengths=np.array(self._lengths),
            labels=np.array(self._labels),
            margins=np.array(self._margins),
            notes=np.array(self._note_lengths),
        )

    def _close_files(self) -> None:
        for file in (self._tokens, self._mask, self._notes):
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._close_files()


class Units:
    """Reads units by number."""

    def __init__(self, folder: Path) -> None:
        index = np.load(folder / INDEX_FILE)
        self._labels, self._margins = index["labels"], index["margins"]
        self._offsets = np.concatenate([[0], np.cumsum(index["lengths"], dtype=np.int64)])
        self._documents = np.concatenate([[0], np.cumsum(index["sizes"], dtype=np.int64)])
        self.lengths = np.diff(self._offsets[self._documents])
        """Tokens of each unit, int64 [number of units]."""
        self._tokens = _mapped(folder / TOKENS_FILE, "<i4")
        self._mask = _mapped(folder / MASK_FILE, "u1")
        self._notes = _mapped(folder / NOTES_FILE, "u1")
        self._note_offsets = np.concatenate([[0], np.cumsum(index["notes"], dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Unit:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return tuple(self._document(i) for i in range(self._documents[number], self._documents[number + 1]))

    def note(self, number: int) -> bytes:
        """What else is known of a unit."""
        return self._notes[self._note_offsets[number] : self._note_offsets[number + 1]].tobytes()

    def pack(self, numbers: Iterable[int]) -> Pack:
        """These units as a pack."""
        return Pack(documents=tuple(document for number in numbers for document in self[int(number)]))

    @functools.cached_property
    def digest(self) -> str:
        """Hex digest of everything that the units hold."""
        digest = hashlib.sha256()
        parts = (self._tokens, self._mask, self._offsets, self._documents, self._labels, self._margins)
        for part in (*parts, self._notes, self._note_offsets):
            digest.update(hashlib.sha256(np.ascontiguousarray(part).data).digest())
        return digest.hexdigest()

    @property
    def num_labelled(self) -> tuple[int, int]:
        """Documents that are labelled as unwanted and as wanted."""
        return int(np.count_nonzero(self._labels == 0)), int(np.count_nonzero(self._labels == 1))

    @property
    def num_trained(self) -> int:
        """Tokens that are trained on, in all units."""
        return int(np.count_nonzero(self._mask))

    def _document(self, i: int) -> Document:
        span = slice(self._offsets[i], self._offsets[i + 1])
        margin = float(self._margins[i])
        return Document(
            tokens=self._tokens[span].astype(np.int64),
            mask=self._mask[span].astype(bool),
            label=None if self._labels[i] == _NO_LABEL else bool(self._labels[i]),
            margin=None if np.isnan(margin) else margin,
        )


def _mapped(path: Path, dtype: str) -> np.ndarray:
    """The file as an array; an empty file cannot be mapped."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)
