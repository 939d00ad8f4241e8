"""Answers of a model before and after a stage, for people: Markdown, one self-contained HTML file, and JSON.

In: prompts with both answers, and the wanted ones where they are known. Out: ``samples.md``, ``samples.html``, ``samples.json``.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from headrace_trainer.formats.preview import fenced, shortened

SAMPLES_FILE = "samples"
"""Its name without what tells the three forms apart."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said."""

    text: str
    ended: bool
    """Whether the model ended it, rather than reaching the limit."""
    is_right: bool | None
    """Whether it is the wanted answer, white space around it aside; None where none is known."""

    @property
    def mark(self) -> str:
        """Right, wrong, or nothing where that is not known."""
        return {True: " ✔", False: " ✘", None: ""}[self.is_right]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt."""

    prompt: str
    wanted: str | None
    before: Answer
    after: Answer


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that is shown."""

    kind: str
    """Of the stage."""
    samples: Sequence[Sample]
    held_out: bool
    """Whether the prompts were not trained on."""
    max_tokens: int
    """The longest answer."""

    def exact(self) -> tuple[int, int, int]:
        """How many answers were wanted, and how many of them the model gave before and after."""
        known = [s for s in self.samples if s.wanted is not None]
        return len(known), sum(bool(s.before.is_right) for s in known), sum(bool(s.after.is_right) for s in known)


def write_samples(page: Page, folder: Path) -> None:
    """Write the three files."""
    text = {".md": "\n".join(_markdown(page)), ".html": "\n".join(_html(page)), ".json": _json(page)}
    for suffix, content in text.items():
        (folder / f"{SAMPLES_FILE}{suffix}").write_text(content + "\n", encoding="utf-8")


def _summary(page: Page) -> Iterator[str]:
    origin = "held-out prompts" if page.held_out else "of the prompts that were trained on"
    yield f"{len(page.samples)} {origin}, answered greedily with at most {page.max_tokens} tokens."
    wanted, before, after = page.exact()
    if wanted:
        yield f"Exactly the wanted answer: {before} of {wanted} before, {after} of {wanted} after."


def _markdown(page: Page) -> Iterator[str]:
    yield f"# Answers before and after {page.kind}\n"
    yield from _summary(page)
    for number, sample in enumerate(page.samples, start=1):
        yield f"\n## {number}\n\n{fenced(shortened(sample.prompt))}\n"
        if sample.wanted is not None:
            yield f"Wanted:\n\n{fenced(shortened(sample.wanted))}\n"
        for when, answer in (("Before", sample.before), ("After", sample.after)):
            yield f"{when}{answer.mark}:\n\n{fenced(_shown(answer))}\n"


def _shown(answer: Answer) -> str:
    return shortened(answer.text) + ("" if answer.ended else " [...]")


_STYLE = """\
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { border-bottom: 1px solid #8884; padding: .5rem .6rem; text-align: left; vertical-align: top; }
th:first-child, td:first-child { width: 2.2rem; }
pre { font: 13px/1.45 ui-monospace, monospace; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.right { border-left: 3px solid #2e8b57; }
.wrong { border-left: 3px solid #c8502d; }
.cut::after { content: " [...]"; opacity: .6; }"""


def _html(page: Page) -> Iterator[str]:
    title = f"Answers before and after {escape(page.kind)}"
    knows = any(sample.wanted is not None for sample in page.samples)
    columns = ("", "prompt", *(["wanted"] if knows else []), "before", "after")
    yield f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>'
    yield f"<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<h1>{title}</h1>"
    yield from (f"<p>{escape(line)}</p>" for line in _summary(page))
    yield f"<table>\n<thead><tr>{''.join(f'<th>{column}</th>' for column in columns)}</tr></thead>\n<tbody>"
    for number, sample in enumerate(page.samples, start=1):
        wanted = [_cell(sample.wanted or "")] if knows else []
        cells = [_cell(sample.prompt), *wanted, _answer_cell(sample.before), _answer_cell(sample.after)]
        yield f"<tr><td>{number}</td>{''.join(cells)}</tr>"
    yield "</tbody>\n</table>\n</body>\n</html>"


def _cell(text: str, *, kind: str = "", cut: bool = False) -> str:
    marked = f' class="{kind}"' if kind else ""
    pre = '<pre class="cut">' if cut else "<pre>"
    # A line break right after <pre> is not shown: one more keeps that of the text.
    return f"<td{marked}>{pre}\n{escape(shortened(text))}</pre></td>"


def _answer_cell(answer: Answer) -> str:
    kind = {True: "right", False: "wrong", None: ""}[answer.is_right]
    return _cell(answer.text, kind=kind, cut=not answer.ended)


def _json(page: Page) -> str:
    return json.dumps(asdict(page), indent=1, ensure_ascii=False)
