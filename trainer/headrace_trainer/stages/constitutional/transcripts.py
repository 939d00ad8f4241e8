"""What was asked and said of one prompt: kept whole, and the source of a record, of figures and of pages.

In: a prompt by its number. Out: a ``Transcript``, and its row of JSON, the same on every machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import orjson

from headrace_api.stages.constitutional import Principle
from headrace_trainer import board
from headrace_trainer.formats.records.shapes import Text, Tools
from headrace_trainer.rules import Columns, judge
from headrace_trainer.stages.constitutional.asking import as_answer
from headrace_trainer.stages.constitutional.speakers import Failure, Reason, Said

Row = dict[str, Any]
"""A transcript as JSON values."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt."""

    number: int
    """In the order in which prompts are taken."""
    prompt: Text
    tools: Tools | None
    columns: Columns
    """The record's other columns, for rules."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A critique and the revision after it."""

    principle: str
    critique: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the critic thinks of two answers in one order."""

    swapped: bool
    """Whether the second answer was shown first."""
    thoughts: str | None
    probability: float
    """Of the first answer, whichever was shown first; not clamped."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Why there is no record."""

    reason: str
    step: str
    """Where it went wrong: answer, critique, revision, comparison or violation."""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """Everything about one prompt."""

    asked: Asked
    answers: tuple[str, ...] = ()
    """What the model said at first: one answer, or two that are compared."""
    passes: tuple[Pass, ...] = ()
    principle: str | None = None
    """By which answers are compared."""
    comparisons: tuple[Comparison, ...] = ()
    probability: float | None = None
    """That the first answer is the better one: the label."""
    chosen: int | None = None
    """Which answer was chosen."""
    before: dict[str, bool] = field(default_factory=dict)
    """Principle -> whether the first answer violates it; of pairs, the rejected one."""
    after: dict[str, bool] = field(default_factory=dict)
    """The same of the last revision; of pairs, the chosen one."""
    left_out: LeftOut | None = None

    @property
    def last(self) -> str:
        """The newest answer of one that is revised."""
        return next((p.revision for p in reversed(self.passes) if p.revision is not None), self.answers[0])

    def without_record(self, failure: Failure, *, step: str) -> "Transcript":
        """The transcript up to where it went wrong."""
        return replace(self, left_out=LeftOut(reason=failure.reason, step=step, detail=failure.detail[:500]))

    def row(self) -> Row:
        """As JSON values; what has no value is left out."""
        found: Row = {"number": self.asked.number, "prompt": self.asked.prompt}
        if self.asked.tools is not None:
            found["tools"] = self.asked.tools
        rest = {name: value for name, value in asdict(self).items() if name != "asked"}
        return found | {name: value for name, value in rest.items() if value not in (None, (), {})}


def as_line(row: Row) -> bytes:
    """A row as a line of JSON."""
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def usable(reply: Said | Failure, *, whole: bool, plain: bool) -> str | Failure:
    """The text of a reply, if it can be gone on with.

    Args:
        reply: as a speaker gave it.
        whole: whether it must have ended.
        plain: whether it continues a text, where white space counts.
    """
    if isinstance(reply, Failure):
        return reply
    if not reply.text.strip():
        return Failure(reason=Reason.EMPTY)
    if whole and not reply.ended:
        return Failure(reason=Reason.UNFINISHED)
    return reply.text if plain else reply.text.strip()


def violations(principles: Sequence[Principle], answer: str, columns: Columns) -> dict[str, bool]:
    """Of each principle that has a rule, whether an answer violates it; a rule that came to no end says nothing."""
    found: dict[str, bool] = {}
    for principle in principles:
        if principle.rule is not None:
            board.beat()
            verdict = judge(principle.rule.rule, answer, columns)
            if not verdict.timed_out:
                found[principle.name] = (verdict.score > 0) == (principle.rule.forbids is not None)
    return found


def record(row: Mapping[str, Any]) -> Row | None:
    """What is trained on; None where the prompt gives no record."""
    if "left_out" in row:
        return None
    prompt = row["prompt"]
    kept: Row = {"prompt": prompt}
    if "chosen" in row:
        chosen = row["answers"][row["chosen"]], row["answers"][1 - row["chosen"]]
        kept |= {side: as_answer(prompt, a) for side, a in zip(("chosen", "rejected"), chosen, strict=True)}
    else:
        kept["completion"] = as_answer(prompt, row["passes"][-1]["revision"])
    return kept | ({"tools": row["tools"]} if "tools" in row else {})
