"""Counts per source: documents and characters read, dropped by reason, and kept.

In: one call per document. Out: ``report.json`` and the table that people read.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

REASONS = (
    "noText",
    "minLanguageScore",
    "languages",
    "minWords",
    "maxWords",
    "minMeanWordLength",
    "maxMeanWordLength",
    "maxSymbolToWordRatio",
    "maxBulletLineRatio",
    "maxEllipsisLineRatio",
    "minAlphabeticWordRatio",
    "minStopWords",
    "dedup",
)
"""Why a document is dropped, in the order of the checks: noText, or the manifest field that decided."""


@dataclass
class Count:
    """Documents and their characters."""

    documents: int = 0
    characters: int = 0

    def add(self, characters: int) -> None:
        self.documents += 1
        self.characters += characters

    def plus(self, other: "Count") -> "Count":
        return Count(self.documents + other.documents, self.characters + other.characters)

    def as_json(self) -> dict[str, int]:
        return {"documents": self.documents, "characters": self.characters}


@dataclass
class Funnel:
    """Counts of one source, or of several combined."""

    read: Count = field(default_factory=Count)
    dropped: dict[str, Count] = field(default_factory=dict)

    def drop(self, reason: str, characters: int) -> None:
        """Count a document, already counted as read, as dropped."""
        assert reason in REASONS, reason
        self.dropped.setdefault(reason, Count()).add(characters)

    @property
    def kept(self) -> Count:
        lost = [*self.dropped.values()]
        return Count(
            self.read.documents - sum(c.documents for c in lost),
            self.read.characters - sum(c.characters for c in lost),
        )

    def plus(self, other: "Funnel") -> "Funnel":
        """The sum of two funnels."""
        names = [r for r in REASONS if r in self.dropped or r in other.dropped]
        dropped = {r: self.dropped.get(r, Count()).plus(other.dropped.get(r, Count())) for r in names}
        return Funnel(read=self.read.plus(other.read), dropped=dropped)

    def as_json(self) -> dict[str, Any]:
        dropped = {r: self.dropped[r].as_json() for r in REASONS if r in self.dropped}
        return {"read": self.read.as_json(), "dropped": dropped, "kept": self.kept.as_json()}

    def summary(self) -> str:
        """One line: what was read and what each reason dropped, largest first."""
        losses = sorted(self.dropped.items(), key=lambda item: -item[1].documents)
        said = ", ".join(f"{reason} dropped {count.documents:,}" for reason, count in losses)
        return f"{self.read.documents:,} documents read; {said or 'none dropped'}"


def total_of(funnels: Iterable[Funnel]) -> Funnel:
    """The sum over all sources."""
    total = Funnel()
    for funnel in funnels:
        total = total.plus(funnel)
    return total


def render_table(names: list[str], funnels: list[Funnel]) -> str:
    """The funnel as text: a block per source, then the total if there are several."""
    blocks = [_block(name, funnel) for name, funnel in zip(names, funnels, strict=True)]
    if len(funnels) > 1:
        blocks.append(_block("all sources", total_of(funnels)))
    return "\n".join([f"{'':<24}{'documents':>12}{'':>8}{'characters':>16}{'':>8}", *blocks])


def _block(name: str, funnel: Funnel) -> str:
    rows = [("read", funnel.read)]
    rows += [(f"- {reason}", funnel.dropped[reason]) for reason in REASONS if reason in funnel.dropped]
    rows.append(("kept", funnel.kept))
    return "\n".join([name, *(_row(label, count, whole=funnel.read) for label, count in rows)])


def _row(label: str, count: Count, *, whole: Count) -> str:
    documents = _percent(count.documents, whole.documents)
    characters = _percent(count.characters, whole.characters)
    return f"  {label:<22}{count.documents:>12,}{documents:>8}{count.characters:>16,}{characters:>8}"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
