"""What is trained on, for people: decoded examples with marks around the tokens that count."""

import re
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from headrace_trainer.formats.packs import Document, Unit

OPEN, CLOSE = "⟦", "⟧"
_RUN_CHARACTERS = 600
_RUNS = 12


class SomeUnits(Protocol):
    """Units by number: a list of them, or ``formats.units.Units``."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Unit: ...


def preview(units: SomeUnits, tokenizer: Any, *, n: int = 10) -> str:
    """Examples from all over the data as Markdown, with what is trained on between ⟦ and ⟧.

    Args:
        units: any number of them; only ``n`` are looked at, evenly spaced.
        tokenizer: of ``transformers``, that they were made with.
        n: the most examples.
    """
    count = min(n, len(units))
    chosen = [i * len(units) // count for i in range(count)]
    head = f"What is trained on is between {OPEN} and {CLOSE}; long turns are shortened in the middle.\n"
    return "\n".join([head, *(example for i in chosen for example in _examples(i, units[i], tokenizer))])


def _examples(number: int, unit: Unit, tokenizer: Any) -> Iterator[str]:
    sides = ("",) if len(unit) == 1 else (", chosen", ", rejected")
    for document, side in zip(unit, sides, strict=True):
        text = "".join(_marked(document, tokenizer))
        yield f"### Example {number}{side}: {_facts(document)}\n\n{fenced(text)}\n"


def fenced(text: str) -> str:
    """The text as a block of Markdown, which no text can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _facts(document: Document) -> str:
    facts = [f"{len(document)} tokens", f"{document.num_trained} trained on"]
    facts += [] if document.label is None else [f"label {str(document.label).lower()}"]
    facts += [] if document.margin is None else [f"margin {document.margin:g}"]
    return ", ".join(facts)


def _marked(document: Document, tokenizer: Any) -> Iterator[str]:
    ids, ends = document.tokens.tolist(), [*(np.flatnonzero(np.diff(document.mask)) + 1).tolist(), len(document)]
    done = ""
    for i, end in enumerate(ends):
        # From the beginning each time: a part that is decoded alone loses the space before its first word.
        whole = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text, done = shortened(whole[len(done) :]), whole
        if i < _RUNS // 2 or i >= len(ends) - _RUNS // 2:
            yield f"{OPEN}{text}{CLOSE}" if document.mask[end - 1] else text
        elif i == _RUNS // 2:
            yield f"\n[... {len(ends) - _RUNS} more parts ...]\n"


def shortened(text: str) -> str:
    """The text, without the middle of a long one."""
    half = _RUN_CHARACTERS // 2
    if len(text) <= _RUN_CHARACTERS:
        return text
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
