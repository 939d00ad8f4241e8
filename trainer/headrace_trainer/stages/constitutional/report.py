"""What people see of the transcripts: samples and violations by principle, as Markdown, as one page of HTML, as lines for
the log, and as a picture. Pure, but for the picture.

In: rows of transcripts, and totals. Out: texts, the same on every machine.
"""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from headrace_api.stages.constitutional import ConstitutionFile
from headrace_trainer.stages.constitutional.asking import as_text
from headrace_trainer.stages.constitutional.totals import Count, Totals
from headrace_trainer.stages.constitutional.transcripts import Row

SAMPLES = 10
_PRINCIPLES = 40
"""In the picture."""
_LOGGED_CHARACTERS = 300
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right}article{border:1px solid #ddd;border-radius:6px;padding:0 1rem;margin:1.5rem 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:.6rem;border-radius:4px}
h4{margin:.8rem 0 .2rem}.bar{height:.6rem;background:#c8502d}.after .bar{background:#2a78b5}
""".strip()


class Samples:
    """Rows that gave a record, evenly spaced over all prompts.

    Args:
        total: prompts of the stage.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self.rows: list[Row] = []

    def look(self, row: Row) -> None:
        """Take a row, if it is the first good one of its part of the prompts."""
        due = len(self.rows) * self._total // SAMPLES
        if len(self.rows) < SAMPLES and row["number"] >= due and "left_out" not in row:
            self.rows.append(row)


def parts_of(row: Row) -> Iterator[tuple[str, str]]:
    """A transcript as headings and texts, in the order in which things were said."""
    yield "Prompt", as_text(row["prompt"])
    if "passes" in row:
        yield f"Before{_verdicts(row, 'before')}", row["answers"][0]
        for i, step in enumerate(row["passes"], start=1):
            yield f"Critique {i}, by {step['principle']}", step["critique"]
            last = i == len(row["passes"])
            yield f"After{_verdicts(row, 'after')}" if last else f"Revision {i}", step["revision"]
        return
    for name, answer in zip("AB", row["answers"], strict=True):
        chosen = row["chosen"] == "AB".index(name)
        side = "chosen" if chosen else "rejected"
        yield f"Answer {name}, {side}{_verdicts(row, 'after' if chosen else 'before')}", answer
    for look in row["comparisons"]:
        order = "B before A" if look["swapped"] else "A before B"
        yield f"{order}: probability of A {look['probability']:.3f}", look["thoughts"] or "(chosen at once)"
    yield "Label", f"A with probability {row['probability']:.3f}, by {row['principle']}"


def _verdicts(row: Row, side: str) -> str:
    violated = sorted(name for name, found in row.get(side, {}).items() if found)
    return f" (violates {', '.join(violated)})" if violated else ""


def markdown(rows: Sequence[Row], totals: Totals, constitution: ConstitutionFile) -> str:
    """The page as Markdown."""
    lines = [f"# {_title(constitution)}", "", _summary(totals), ""]
    lines += ["| principle | judged | violated before | violated after |", "|---|--:|--:|--:|"]
    lines += [f"| {name} | {n:,} | {before} | {after} |" for name, n, before, after in _table(totals)]
    for row in rows:
        lines += ["", f"## Prompt {row['number']}"]
        for heading, text in parts_of(row):
            fence = "~" * (3 + max((len(run) for run in _runs(text)), default=0))
            lines += ["", f"**{heading}**", "", f"{fence}text", text, fence]
    return "\n".join([*lines, ""])


def _runs(text: str) -> list[str]:
    """Runs of tildes, which would end a block of text that they are in."""
    return [run for run in "".join(c if c == "~" else " " for c in text).split() if run]


def page(rows: Sequence[Row], totals: Totals, constitution: ConstitutionFile) -> str:
    """The page as HTML, with nothing outside it."""
    title = html.escape(_title(constitution))
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    lines = [head, f"<h1>{title}</h1>", f"<p>{html.escape(_summary(totals))}</p>"]
    lines += ["<table><tr><th>principle<th>judged<th>violated before<th>after"]
    for name, n, before, after in _table(totals):
        cells = _bar(before, "before") + _bar(after, "after")
        lines.append(f'<tr><td>{html.escape(name)}<td class="n">{n:,}{cells}')
    lines.append("</table>")
    for row in rows:
        lines.append(f"<article><h3>Prompt {row['number']}</h3>")
        for heading, text in parts_of(row):
            lines.append(f"<h4>{html.escape(heading)}</h4><pre>{html.escape(text)}</pre>")
        lines.append("</article>")
    return "\n".join([*lines, "</html>", ""])


def _bar(share: str, side: str) -> str:
    return f'<td class="{side}">{share}<div class="bar" style="width:{share if share.endswith("%") else "0%"}"></div>'


def _title(constitution: ConstitutionFile) -> str:
    return f"Samples, by constitution {constitution.version}"


def _summary(totals: Totals) -> str:
    left = ", ".join(f"{reason} {count:,}" for reason, count in sorted(totals.left_out.items()))
    return f"{totals.records:,} records of {totals.prompts:,} prompts" + (f"; left out: {left}." if left else ".")


def _table(totals: Totals) -> Iterator[tuple[str, int, str, str]]:
    for name in totals.principles():
        before, after = totals.before.get(name), totals.after.get(name)
        yield name, max(c.judged for c in (before, after) if c is not None), _share(before), _share(after)


def _share(count: Count | None) -> str:
    return "" if count is None else f"{count.share:.1%}"


def logged(row: Row) -> Iterator[str]:
    """A transcript as lines for the log; what a model wrote cannot move a terminal's cursor."""
    for heading, text in parts_of(row):
        shown = text if len(text) <= _LOGGED_CHARACTERS else f"{text[:_LOGGED_CHARACTERS]}..."
        yield f"prompt {row['number']}: {heading}: {_harmless(shown)}"


def _harmless(text: str) -> str:
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text.replace("\n", " "))


def logged_totals(totals: Totals) -> Iterator[str]:
    """Violations by principle as lines for the log."""
    yield _summary(totals)
    for name, n, before, after in _table(totals):
        yield f"violations of {name}: before {before}, after {after} (of {n:,})"


def draw(totals: Totals, out: Path) -> None:
    """Violations before and after, by principle, as a picture; the same figures give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = totals.principles()[:_PRINCIPLES]
    figure = Figure(figsize=(8, 1.2 + 0.45 * max(1, len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for offset, side, counts, colour in (
        (-0.2, "before", totals.before, "#c8502d"),
        (0.2, "after", totals.after, "#2a78b5"),
    ):
        shares = [counts.get(name, Count()).share for name in names]
        axes.barh([i + offset for i in range(len(names))], shares, height=0.38, label=side, color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of answers that violate the principle")
    axes.legend(loc="lower right")
    # No metadata: it would hold matplotlib's version.
    figure.savefig(out, metadata={"Software": None})
