"""Records that cannot be used: why, where, how many, and how many are too many.

In: ``BadRecord`` values among good ones, as ``reading`` and ``encoding`` give them. Out: counts for the report, or a
``UserError`` with the first places.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from headrace_trainer.errors import UserError

T = TypeVar("T")

_SHOWN = 5
_DETAIL_CHARACTERS = 200


class Reason(StrEnum):
    """Why a record cannot be used; the word is the key of its count in the report."""

    NOT_UTF8 = "notUtf8"
    NOT_JSON = "notJson"
    TOO_LARGE = "tooLarge"
    UNREADABLE = "unreadable"
    MISSING_FIELD = "missingField"
    WRONG_TYPE = "wrongType"
    NOT_FINITE = "notFinite"
    EMPTY = "empty"
    EQUAL_SIDES = "equalSides"
    BAD_TURN = "badTurn"
    NO_ASSISTANT = "noAssistant"
    TEMPLATE = "template"
    CONTROL_TOKEN = "controlToken"


_REMEDIES = {
    Reason.NOT_UTF8: "convert the file, as with iconv -t UTF-8",
    Reason.NOT_JSON: "each line must be one whole JSON object, without NaN and without unpaired surrogates",
    Reason.TOO_LARGE: "split or remove the record",
    Reason.UNREADABLE: "copy or write the file again",
    Reason.MISSING_FIELD: "give every record of a source the same fields, or make two sources of it",
    Reason.WRONG_TYPE: "texts are strings or lists of turns with role and content",
    Reason.NOT_FINITE: "write a finite number",
    Reason.EMPTY: "fill in or remove the record",
    Reason.EQUAL_SIDES: "remove pairs without a preference",
    Reason.BAD_TURN: "a turn has a role and a content, as {role: user, content: ...}",
    Reason.NO_ASSISTANT: "remove conversations without an answer of the assistant",
    Reason.TEMPLATE: "change the record, or the tokenizer's chat template",
    Reason.CONTROL_TOKEN: "remove the token from the text: it would end or begin a turn",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a record is."""

    file: str
    """The file's address."""
    number: int
    """Its line in JSON lines, its row in Parquet; from 1."""

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


class Unusable(Exception):
    """A record cannot be used; whoever knows its place makes a ``BadRecord`` of it."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record, or several that follow one another, that cannot be used."""

    place: Place
    reason: Reason
    detail: str
    records: int = 1
    """How many are lost with it: more than one where a block of a Parquet file cannot be read."""

    def __str__(self) -> str:
        detail = " ".join(self.detail.split())
        return f"{self.place}: {self.reason}: {detail[:_DETAIL_CHARACTERS]}"


@dataclass
class Tally:
    """How many records of one source were good and bad."""

    name: str
    """What the manifest calls the source."""
    good: int = 0
    bad: Counter[Reason] = field(default_factory=Counter)
    first: list[BadRecord] = field(default_factory=list)

    def good_ones(self, records: Iterable[T | BadRecord]) -> Iterator[T]:
        """The good ones among ``records``, all of them counted."""
        for record in records:
            if isinstance(record, BadRecord):
                self.add(record)
            else:
                self.good += 1
                yield record

    def add(self, bad: BadRecord) -> None:
        """Count a bad record."""
        self.bad[bad.reason] += bad.records
        if len(self.first) < _SHOWN:
            self.first.append(bad)

    def check(self, *, max_bad_fraction: float) -> None:
        """Compare with the budget, once every record of the source was counted.

        Raises:
            UserError: too many are bad, or the source has no records.
        """
        bad = self.bad.total()
        if bad > max_bad_fraction * (self.good + bad):
            raise UserError(self._too_many(bad, max_bad_fraction))
        if self.good == 0:
            raise UserError(f"{self.name}: {bad or 'no'} records, none of them usable; check the address and its files")

    def _too_many(self, bad: int, allowed: float) -> str:
        total = self.good + bad
        counts = ", ".join(f"{reason} {count:,}" for reason, count in self.bad.most_common())
        places = "; ".join(str(record) for record in self.first)
        worst = self.bad.most_common(1)[0][0]
        return (
            f"{self.name}: {bad:,} of {total:,} records ({bad / total:.2%}) cannot be used, and maxBadFraction allows "
            f"{allowed:.2%}: {counts}. First: {places}. {worst}: {_REMEDIES[worst]}; or raise maxBadFraction"
        )

    def as_json(self) -> dict[str, Any]:
        """As in the report."""
        bad = {reason.value: count for reason, count in sorted(self.bad.items())}
        return {"source": self.name, "good": self.good, "bad": bad, "first": [str(b) for b in self.first]}
