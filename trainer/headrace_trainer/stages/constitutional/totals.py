"""What became of all prompts: records, prompts without one and why, and violations by principle. Pure.

In: rows of transcripts. Out: figures of the stage, and the error where too many prompts failed.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from headrace_api.stages import Constitutional
from headrace_trainer.stages.constitutional.speakers import REMEDIES, Reason
from headrace_trainer.stages.constitutional.transcripts import Row

SHOWN_PRINCIPLES = 16
"""Principles whose figures are among the stage's; the report has all of them."""


@dataclass
class Count:
    """Of answers that were judged by one principle."""

    judged: int = 0
    violated: int = 0

    @property
    def share(self) -> float:
        """Of them, the part that violates it."""
        return self.violated / self.judged if self.judged else 0.0


@dataclass
class Totals:
    """Counts, row by row."""

    prompts: int = 0
    records: int = 0
    changed: int = 0
    """Answers whose revision says something else."""
    left_out: Counter[Reason] = field(default_factory=Counter)
    first: dict[Reason, str] = field(default_factory=dict)
    """One example of each reason."""
    before: dict[str, Count] = field(default_factory=dict)
    after: dict[str, Count] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Count one prompt."""
        self.prompts += 1
        if "left_out" in row:
            found = row["left_out"]
            reason = Reason(found["reason"])
            self.left_out[reason] += 1
            self.first.setdefault(reason, f"prompt {row['number']}, {found['step']}: {found['detail'] or reason.value}")
            return
        self.records += 1
        self.changed += "passes" in row and row["answers"][0] != row["passes"][-1]["revision"]
        for side, counts in (("before", self.before), ("after", self.after)):
            for principle, violated in row.get(side, {}).items():
                count = counts.setdefault(principle, Count())
                count.judged += 1
                count.violated += violated

    @property
    def failed(self) -> int:
        """Prompts that count against the budget."""
        return sum(count for reason, count in self.left_out.items() if reason.is_failure)

    def problem(self, config: Constitutional, *, total: int) -> str | None:
        """Why the stage must fail; None while it need not.

        Args:
            config: the stage's.
            total: prompts of the stage, of which some may be still to come.
        """
        if self.failed > config.max_failed_share * total:
            counts = ", ".join(f"{reason} {count:,}" for reason, count in self._failures())
            worst = self._failures()[0][0]
            return (
                f"constitutional.maxFailedShare: {config.max_failed_share:g}: {self.failed:,} of {total:,} prompts gave no "
                f"record: {counts}; {self.first[worst]}: {REMEDIES[worst]}, or raise maxFailedShare"
            )
        if self.prompts == total and not self.records:
            counts = ", ".join(f"{reason} {count:,}" for reason, count in self.left_out.most_common())
            return f"constitutional.data: none of {total:,} prompts gave a record: {counts}: raise temperature"
        return None

    def metrics(self) -> dict[str, float]:
        """The stage's figures."""
        found = {
            "promptsIn": float(self.prompts),
            "recordsOut": float(self.records),
            "failed": float(self.failed),
            "tied": float(self.left_out.total() - self.failed),
            "changed": self.changed / self.records if self.records else 0.0,
        }
        for side, counts in (("Before", self.before), ("After", self.after)):
            if counts:
                found[f"violations{side}"] = _mean(counts)
            for name in self.principles()[:SHOWN_PRINCIPLES]:
                if name in counts:
                    found[f"violations/{name}/{side.lower()}"] = counts[name].share
        return found

    def principles(self) -> list[str]:
        """Their names, the most violated first."""
        names = {*self.before, *self.after}
        return sorted(names, key=lambda name: (-self.before.get(name, Count()).share, name))

    def as_json(self) -> dict[str, Any]:
        """As in the report."""
        return {
            "prompts": self.prompts,
            "records": self.records,
            "changed": self.changed,
            "leftOut": {reason.value: count for reason, count in sorted(self.left_out.items())},
            "first": {reason.value: text for reason, text in sorted(self.first.items())},
            "violations": {
                name: {
                    side: {"judged": count.judged, "violated": count.violated}
                    for side, counts in (("before", self.before), ("after", self.after))
                    if (count := counts.get(name)) is not None
                }
                for name in self.principles()
            },
        }

    def _failures(self) -> list[tuple[Reason, int]]:
        return [(reason, count) for reason, count in self.left_out.most_common() if reason.is_failure]


def _mean(counts: dict[str, Count]) -> float:
    """Over all judgements."""
    judged = sum(count.judged for count in counts.values())
    return sum(count.violated for count in counts.values()) / judged if judged else 0.0
