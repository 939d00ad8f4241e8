"""A record -> a unit of documents: rendered, tokenized, masked and cut to the model's length.

In: records of ``formats.records``, bad ones among them. Out: ``Encoded`` values and ``BadRecord`` values. What is trained
on: all of a text; of a conversation, what the assistant says; of a prompt and a completion, the completion. The token that
ends a turn or a document is trained on. Tokens behind the last that is trained on are left out: nothing depends on them.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from headrace_trainer.formats.chat.template import ChatTemplate, Rendered
from headrace_trainer.formats.chat.tokens import Piece, Pieces, TextTokenizer, load
from headrace_trainer.formats.packs import Document, Unit, unit_length
from headrace_trainer.formats.records import (
    BadRecord,
    ChatRecord,
    CompletionRecord,
    PairRecord,
    PromptRecord,
    Reason,
    Record,
    TextRecord,
    Unusable,
)
from headrace_trainer.formats.records.shapes import Text, Tools, Turn

T = TypeVar("T")

_AT_ONCE = 256
"""Records that are tokenized together, on all processors."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A record as tokens."""

    record: Record
    unit: Unit | None
    """None where nothing that can be trained on is left within the model's length."""
    truncated: int = 0
    """Documents of the unit whose end was cut off."""


class Encoder:
    """Makes units of records with the tokenizer and the chat template of an artifact."""

    def __init__(self, folder: Path, *, sequence_length: int) -> None:
        """Load the tokenizer.

        Args:
            folder: a tokenizer artifact.
            sequence_length: tokens that the model sees at once: the most of a unit.

        Raises:
            UserError: the tokenizer cannot be read, or has no end-of-document token.
        """
        self.tokenizer = load(folder)
        self.template = ChatTemplate(self.tokenizer, name=str(folder))
        self.tokens = TextTokenizer(self.tokenizer, name=str(folder), longest=sequence_length)
        self._length = sequence_length
        self._spans_checked = False

    def encode(self, records: Iterable[Record | BadRecord]) -> Iterator[Encoded | BadRecord]:
        """Every record as a unit, in order; one that cannot be rendered is a bad one.

        Raises:
            UserError: the records are conversations, and the chat template has no spans to train on.
        """
        for batch in _batches(records, _AT_ONCE):
            rendered = [self._try_to_render(record) for record in batch]
            good = [pieces for pieces in rendered if not isinstance(pieces, BadRecord)]
            documents = iter(self.tokens.documents([p for pieces in good for p in pieces]))
            for record, pieces in zip(batch, rendered, strict=True):
                if isinstance(record, BadRecord) or isinstance(pieces, BadRecord):
                    assert isinstance(pieces, BadRecord)
                    yield pieces
                else:
                    yield self._fitted(record, tuple(next(documents) for _ in pieces))

    def stop_ids(self) -> list[int]:
        """The tokens at which an answer is over: the end of a document, and that of an assistant's turn if there is one."""
        ids = {self.tokens.eos_id}
        if self.tokenizer.chat_template is not None and self.template.has_spans():
            turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
            (document,) = self.tokens.documents([_said(self.template.render(turns))])
            said = document.tokens[document.mask]
            ids |= {int(i) for i in said if int(i) in self.tokens.special_ids}
        return sorted(ids)

    def _try_to_render(self, record: Record | BadRecord) -> tuple[Pieces, ...] | BadRecord:
        if isinstance(record, BadRecord):
            return record
        try:
            return self._render(record)
        except Unusable as error:
            return BadRecord(place=record.place, reason=error.reason, detail=error.detail)

    def _render(self, record: Record) -> tuple[Pieces, ...]:
        match record:
            case TextRecord():
                return (Pieces(parts=(Piece(text=record.text, trained=True),), begin=True, end=True),)
            case ChatRecord():
                return (self._conversation(record),)
            case PromptRecord():
                return (self._prompt(record.prompt, record.tools),)
            case CompletionRecord():
                return (self._completion(record.prompt, record.completion, record.tools),)
            case PairRecord():
                sides = (record.chosen, record.rejected)
                return tuple(self._completion(record.prompt, side, record.tools) for side in sides)

    def _conversation(self, record: ChatRecord) -> Pieces:
        if not self._spans_checked:
            self.template.check_spans()
            self.template.check_turn_ends(self.tokens.specials)
            self._spans_checked = True
        self._check_no_control(record.messages)
        rendered = self.template.render(record.messages, tools=record.tools)
        if not rendered.spans:
            raise Unusable(Reason.TEMPLATE, "the chat template prints no turn of the assistant's")
        return _said(rendered)

    def _prompt(self, prompt: Text, tools: Tools | None) -> Pieces:
        if isinstance(prompt, str):
            return Pieces(parts=(Piece(text=prompt, trained=False),), begin=True)
        self._check_no_control(prompt)
        return Pieces(parts=(Piece(text=self.template.render(prompt, tools=tools, ask=True).text, trained=False),))

    def _completion(self, prompt: Text, completion: Text, tools: Tools | None) -> Pieces:
        if isinstance(prompt, str) or isinstance(completion, str):
            assert isinstance(prompt, str) and isinstance(completion, str)
            parts = (Piece(text=prompt, trained=False), Piece(text=completion, trained=True))
            return Pieces(parts=parts, begin=True, end=True)
        self._check_no_control([*prompt, *completion])
        asked = self.template.render(prompt, tools=tools, ask=True).text
        whole = self.template.render([*prompt, *completion], tools=tools)
        if not whole.text.startswith(asked):
            raise Unusable(
                Reason.TEMPLATE,
                "the chat template renders the prompt in another way once an answer follows: "
                f"{asked[-40:]!r} is not where it begins",
            )
        return self._after(asked, whole)

    def _after(self, asked: str, whole: Rendered) -> Pieces:
        """What follows the prompt: the template's spans there, or all of it up to the end of the turn."""
        begin = len(asked)
        spans = tuple((max(a, begin), b) for a, b in whole.spans if b > begin)
        if spans:
            return _said(Rendered(text=whole.text, spans=spans))
        answer = whole.text[begin:].rstrip()
        if not answer:
            raise Unusable(Reason.TEMPLATE, "the chat template prints nothing of the answer")
        parts = (Piece(text=asked, trained=False), Piece(text=answer, trained=True))
        return Pieces(parts=parts, end=not self.tokens.ends_special(answer))

    def _check_no_control(self, turns: list[Turn]) -> None:
        for i, turn in enumerate(turns):
            for text in _texts_in(turn):
                found = next((token for token in self.tokens.specials if token in text), None)
                if found is not None:
                    raise Unusable(Reason.CONTROL_TOKEN, f"turn {i} holds {found!r} in its text")

    def _fitted(self, record: Record, documents: tuple[Document, ...]) -> Encoded:
        if isinstance(record, PromptRecord):
            (document,) = documents
            fits = 0 < len(document) < self._length  # an answer needs room
            return Encoded(record=record, unit=(document,) if fits else None)
        whole = tuple(_up_to_last_trained(document) for document in documents)
        cut = self._cut(whole)
        truncated = sum(len(a) < len(b) for a, b in zip(cut, whole, strict=True))
        usable = all(d.num_trained for d in cut) and not _are_equal(cut)
        return Encoded(record=record, unit=_marked(record, cut) if usable else None, truncated=truncated)

    def _cut(self, unit: Unit) -> Unit:
        """The beginnings of the documents, as much as fits: a pair's longer side gives way first."""
        if unit_length(unit) <= self._length:
            return unit
        if len(unit) == 1:
            return (_up_to_last_trained(_first(unit[0], self._length)),)
        one, other = unit
        half = self._length // 2
        limits = (max(half, self._length - len(other)), max(half, self._length - len(one)))
        return tuple(_up_to_last_trained(_first(d, limit)) for d, limit in zip(unit, limits, strict=True))


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _said(rendered: Rendered) -> Pieces:
    """The text in parts, by the spans of what the assistant says."""
    parts, done = [], 0
    for begin, end in rendered.spans:
        parts += [
            Piece(text=rendered.text[done:begin], trained=False),
            Piece(text=rendered.text[begin:end], trained=True),
        ]
        done = end
    return Pieces(parts=tuple(part for part in (*parts, Piece(text=rendered.text[done:], trained=False)) if part.text))


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for item in value.values() for text in _texts_in(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in _texts_in(item))


def _first(document: Document, count: int) -> Document:
    return replace(document, tokens=document.tokens[:count], mask=document.mask[:count])


def _up_to_last_trained(document: Document) -> Document:
    trained = np.flatnonzero(document.mask)
    return _first(document, int(trained[-1]) + 1 if len(trained) else 0)


def _are_equal(unit: Unit) -> bool:
    """Whether the two sides of a pair are the same tokens, as after a cut before their first difference."""
    return len(unit) == 2 and np.array_equal(unit[0].tokens, unit[1].tokens)


def _marked(record: Record, unit: Unit) -> Unit:
    """The unit with what its record says of it."""
    if isinstance(record, CompletionRecord):
        return tuple(replace(document, label=record.label) for document in unit)
    if isinstance(record, PairRecord):
        return (replace(unit[0], margin=record.margin), *unit[1:])
    return unit
