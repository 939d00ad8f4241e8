"""Tasks for the assistant of ``manifests/assistant.yaml``: made here, by rules that anybody can check, without a network.

Usage: ``scripts/assistant_tasks.py FOLDER``. Every task is a question with one right answer. A question is held out or
trained on by a hash of its words, so no held-out question is ever seen in training, in any file.

    sft.jsonl                 conversations; two in three answer shortly, the others in a sentence
    pairs.jsonl               pairs of right answers: the sentence is preferred to the short one
    held-out-short.jsonl      held-out questions, with the short answer
    held-out-sentence.jsonl   the same questions, with the sentence
"""

import hashlib
import itertools
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 1234
NUM_CONVERSATIONS, NUM_PAIRS, NUM_HELD_OUT = 9000, 1500, 200
HELD_OUT_ONE_IN = 8
SHORT_PART = 2 / 3
"""Of the conversations: the style that a model has before its preferences are trained."""
_WORDS = (
    "apple", "bread", "chair", "dance", "earth", "floor", "glass", "house", "iron", "judge", "kitchen",
    "letter", "money", "night", "ocean", "paper", "queen", "river", "stone", "table", "uncle", "voice",
    "water", "year", "zero",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A question, and its answer in two styles."""

    question: str
    short: str

    @property
    def sentence(self) -> str:
        """The answer as a whole sentence: what preferences ask for."""
        return f"The answer is {self.short}."

    @property
    def is_held_out(self) -> bool:
        """Decided by the question alone."""
        return hashlib.sha256(self.question.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def all_tasks() -> Iterator[Task]:
    """Every task there is."""
    for digits in itertools.permutations(range(10), 3):
        said = " ".join(map(str, digits))
        yield Task(f"Sort {said}", " ".join(map(str, sorted(digits))))
        yield Task(f"Largest of {said}", str(max(digits)))
        yield Task(f"Smallest of {said}", str(min(digits)))
    for one, other in itertools.permutations(_WORDS, 2):
        yield Task(f"Which comes first in a dictionary, {one} or {other}?", min(one, other))


def turn(role: str, content: str) -> list[dict[str, str]]:
    """One turn, as a list."""
    return [{"role": role, "content": content}]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows):,} records")


def main(folder: Path) -> None:
    """Write the four files."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(SEED)
    tasks = list(all_tasks())
    draw.shuffle(tasks)
    training = [task for task in tasks if not task.is_held_out]
    held_out = [task for task in tasks if task.is_held_out][:NUM_HELD_OUT]
    conversations = []
    for task in (training[i % len(training)] for i in range(NUM_CONVERSATIONS)):
        said = task.short if draw.random() < SHORT_PART else task.sentence
        conversations.append({"messages": turn("user", task.question) + turn("assistant", said)})
    pairs = [
        {
            "prompt": turn("user", task.question),
            "chosen": turn("assistant", task.sentence),
            "rejected": turn("assistant", task.short),
        }
        for task in training[:NUM_PAIRS]
    ]
    write(folder / "sft.jsonl", conversations)
    write(folder / "pairs.jsonl", pairs)
    for style in ("short", "sentence"):
        rows = [
            {"prompt": turn("user", task.question), "completion": turn("assistant", getattr(task, style))}
            for task in held_out
        ]
        write(folder / f"held-out-{style}.jsonl", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
