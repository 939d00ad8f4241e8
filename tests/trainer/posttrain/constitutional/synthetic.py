"""A language in which a rule can be broken and mended: what a model is taught before it is held to a constitution.

A prompt has two letters, and the right answer is the first one. Half of the demonstrations swear after it. The model is
taught as well to say whether an answer swears, to leave that out, and, by another principle, to say an answer again. Which
pairs of letters are held out is decided by a fixed draw. A useful answer begins with the right letter; whether it swears
is another matter.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from headrace_api.stages.constitutional import Principle
from headrace_trainer.stages.constitutional import asking

LETTERS = "abcdefghijklmnop"
SWEARS: dict[str, Any] = {"forbids": {"regex": {"pattern": "ugh"}}}

MEND: dict[str, Any] = {
    "name": "no-swearing",
    "critiqueRequest": "Is there ugh?",
    "revisionRequest": "Leave ugh out.",
    "comparisonQuestion": "Which has no ugh?",
    "rule": SWEARS,
}
"""A principle that asks for something."""
REPEAT: dict[str, Any] = {
    "name": "nothing",
    "critiqueRequest": "What is it?",
    "revisionRequest": "Say it again.",
    "comparisonQuestion": "Which is it?",
    "rule": SWEARS,
}
"""One that asks for nothing."""

_PAIRS = [(a, b) for a in LETTERS for b in LETTERS if a != b]
random.Random(5).shuffle(_PAIRS)
TRAINED, HELD_OUT = _PAIRS[:160], _PAIRS[160:]
"""80 pairs of letters are in no record that anything is trained on."""


def prompt(pair: tuple[str, str]) -> str:
    return f"{pair[0]} {pair[1]}:"


def is_useful(row: dict[str, Any], answer: str) -> bool:
    """Whether an answer to the prompt of a transcript begins with the right letter, and says nothing more than it may."""
    return answer.split() in ([row["prompt"][0]], [row["prompt"][0], "ugh"])


def demonstrations(count: int, *, seed: int = 0) -> Iterator[dict[str, str]]:
    """Answers, critiques and revisions."""
    draw = random.Random(seed)
    principles = [(p, Principle.model_validate(p)) for p in (MEND, REPEAT)]
    for _ in range(count):
        pair = draw.choice(TRAINED)
        clean = f" {pair[0]}"
        answer = draw.choice([clean, f"{clean} ugh"])
        kind = draw.choice(["answer", "help", "critique", "revision", "revision"])
        if kind == "answer":
            yield {"prompt": prompt(pair), "completion": answer}
        elif kind == "help":
            yield from helpful([pair])
        else:
            block, principle = draw.choice(principles)
            found = (" yes" if "ugh" in answer else " no") if block is MEND else " it"
            if kind == "critique":
                yield {"prompt": str(asking.critique(prompt(pair), answer, principle)), "completion": found}
            else:
                asked = str(asking.revision(prompt(pair), answer, found, principle))
                yield {"prompt": asked, "completion": clean if block is MEND else answer}


def helpful(pairs: Sequence[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """Another kind of question, about which there is nothing to swear."""
    for one, other in pairs:
        yield {"prompt": f"Last of {one} {other}:", "completion": f" {other}"}
