"""Text in pieces -> token ids and what is trained on, so that a prompt has the same ids whatever follows it.

In: pieces, each trained on or not. Out: ``Document`` values. A piece is tokenized apart from the ones before it: a model
that is asked has only the prompt's own tokens before it, and one token over the boundary would be seen in training alone.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace_trainer.errors import UserError
from headrace_trainer.formats.packs import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBES = (("a\n", "b c"), ("a", " b"), ("a ", "é"), ("a\n", "\n\nb"))
"""Texts and continuations by which a way of tokenizing apart is tried."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a text."""

    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A text in parts."""

    parts: tuple[Piece, ...]
    begin: bool = False
    """Whether the token that the tokenizer puts at the beginning goes there, unless the text has it."""
    end: bool = False
    """Whether the end-of-document token goes to the end and is trained on, unless the text has it."""


class TextTokenizer:
    """Token ids of texts that come in pieces."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, name: str, longest: int) -> None:
        """Learn what the tokenizer does at the beginning of a text.

        Args:
            tokenizer: a fast one, with an end-of-document token.
            name: what people call it.
            longest: tokens beyond this many are of no use, so that a text of any size takes bounded work.

        Raises:
            UserError: it has no end-of-document token.
        """
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        if tokenizer.eos_token_id is None:
            raise UserError(f"{name}: has no eos_token; name one in its tokenizer_config.json")
        self.eos, self.eos_id = str(tokenizer.eos_token), int(tokenizer.eos_token_id)
        self.special_ids = frozenset(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)
        self.specials = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        """The texts of the special tokens."""
        added = {t.content for t in tokenizer.added_tokens_decoder.values()}
        self._added = tuple(sorted(added, key=lambda text: (-len(text), text)))
        self._beginning = self._find_beginning()
        self._guard = self._find_guard()
        self._guard_lengths = {guard: len(self.ids(guard)) for guard in ("", self._guard, *self._added)}
        self._most_characters = (longest + 1) * max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def ids(self, text: str) -> list[int]:
        """The ids of a text that stands alone, without anything added."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def ends_special(self, text: str) -> bool:
        """Whether a text ends with a special token."""
        return text.endswith(self.specials)

    def documents(self, texts: Sequence[Pieces]) -> list[Document]:
        """The texts as tokens, whole: nothing is cut but what is far beyond the longest text of use."""
        encoded = self._encode_all(texts)
        return [self._document(text, [next(encoded) for _ in text.parts]) for text in texts]

    def _encode_all(self, texts: Sequence[Pieces]) -> Iterator[list[int]]:
        """The ids of every piece of every text, in order."""
        guarded: list[tuple[str, str]] = []
        for text in texts:
            before = ""
            for part in text.parts:
                guarded.append((self._guard_after(before), part.text[: self._most_characters]))
                before = part.text or before
        encodings = self._backend.encode_batch_fast([g + t for g, t in guarded], add_special_tokens=False)
        for (guard, _), encoding in zip(guarded, encodings, strict=True):
            yield encoding.ids[self._guard_lengths[guard] :]

    def _guard_after(self, before: str) -> str:
        """What to put before a piece and to cut off again: the token that the text before it ends with, if it is an added one."""
        if not before:
            return ""
        return next((token for token in self._added if before.endswith(token)), self._guard)

    def _document(self, text: Pieces, ids: list[list[int]]) -> Document:
        tokens = list(itertools.chain.from_iterable(ids))
        trained = np.repeat([part.trained for part in text.parts], [len(of_part) for of_part in ids])
        if text.begin and tokens[: len(self._beginning)] != self._beginning:
            tokens = self._beginning + tokens
            trained = np.concatenate([np.zeros(len(self._beginning), dtype=bool), trained])
        if text.end and tokens[-1:] != [self.eos_id]:
            tokens, trained = [*tokens, self.eos_id], np.append(trained, True)
        trained[:1] = False
        return Document(tokens=np.array(tokens, dtype=np.int64), mask=trained)

    def _find_beginning(self) -> list[int]:
        """What the tokenizer itself puts before a text, such as Llama's ``<|begin_of_text|>``."""
        plain, whole = self.ids("a"), self._backend.encode("a").ids
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return list(whole[:at])

    def _find_guard(self) -> str:
        """What to put before a piece that follows plain text, so that it is not taken for a beginning.

        Tokenizers of SentencePiece's kind put a space before the first word of a text, some of them also after a special
        token. Where nothing helps, the end-of-document token does least harm: byte-level tokenizers add nothing at all.
        """
        return next((guard for guard in (self.eos, "\n") if self._is_transparent(guard)), self.eos)

    def _is_transparent(self, guard: str) -> bool:
        length = len(self.ids(guard))
        return all(
            self.ids(guard)[:length] == self.ids(guard + after)[:length]
            and self._decode(self.ids(before) + self.ids(guard + after)[length:])
            == self._decode(self.ids(before + after))
            for before, after in _PROBES
        )

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text


def load(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of an artifact, by ``transformers``.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises OSError, ValueError, KeyError and others
        raise UserError(f"{folder}: transformers cannot load the tokenizer: {error}; export it again") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: the tokenizer has no tokenizer.json; convert it, as by save_pretrained of a fast one"
        )
    return tokenizer  # type: ignore[no-any-return]
