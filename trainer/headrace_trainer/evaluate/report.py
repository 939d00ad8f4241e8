"""What the evaluate stage shows: a table of figures, and tokens that were expected or not. ``report.json``, ``report.md``.

Every loss that is printed is ``surprisal`` of the probability that is printed beside it, and every perplexity is
``perplexity`` of its loss.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from headrace_trainer.evaluate.measures import perplexity, surprisal

_CONTEXT_TOKENS = 12
_SHOWN = 4
_SCALE = (0.9, 0.5, 0.1, 0.01)
"""Probabilities that give a feeling for losses."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One token that came, and how much it was expected."""

    context: str
    token: str
    probability: float

    @property
    def loss(self) -> float:
        """Its surprisal, in nats."""
        return surprisal(self.probability)


def choose_examples(
    losses_NT: NDArray[np.float32], tokens_NT: NDArray[np.int64], tokenizer: Tokenizer
) -> list[Example]:
    """The most expected tokens, some ordinary ones, and the least expected.

    Args:
        losses_NT: of each token.
        tokens_NT: the tokens that were predicted.
        tokenizer: for their text.
    """
    eligible = losses_NT[:, _CONTEXT_TOKENS:].ravel()
    order = np.argsort(eligible, kind="stable")
    middle = len(order) // 2
    picked = [*order[:_SHOWN], *order[middle : middle + _SHOWN], *order[-_SHOWN:]]
    width = losses_NT.shape[1] - _CONTEXT_TOKENS
    places = [(int(i) // width, int(i) % width + _CONTEXT_TOKENS) for i in picked]
    return [_example(losses_NT, tokens_NT, tokenizer, n, t) for n, t in places]


def _example(
    losses_NT: NDArray[np.float32], tokens_NT: NDArray[np.int64], tokenizer: Tokenizer, n: int, t: int
) -> Example:
    context = tokenizer.decode(tokens_NT[n, t - _CONTEXT_TOKENS : t].tolist())
    token = tokenizer.decode([int(tokens_NT[n, t])], skip_special_tokens=False)
    return Example(context=context, token=token, probability=float(np.exp(-np.float64(losses_NT[n, t]))))


def figures_table(metrics: dict[str, float]) -> Table:
    """Loss and perplexity, the model's beside the baseline's."""
    table = Table(title="Held-out text", title_justify="left")
    for column in ("", "loss (nats a token)", "perplexity = exp(loss)", "bits per byte"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    model, baseline = metrics["loss"], metrics["unigramLoss"]
    table.add_row("model", f"{model:.4f}", f"{perplexity(model):.2f}", f"{metrics['bitsPerByte']:.4f}")
    table.add_row("unigram baseline", f"{baseline:.4f}", f"{perplexity(baseline):.2f}", "")
    table.add_row("baseline / model", "", f"{metrics['unigramRatio']:.2f}", "")
    return table


def examples_table(examples: Sequence[Example]) -> Table:
    """Tokens with the probability that they had and the loss that follows from it."""
    table = Table(title="What a loss means: -log of the probability of the token that came", title_justify="left")
    for column in ("context", "token", "probability", "loss"):
        table.add_column(column, justify="right" if column in ("probability", "loss") else "left", no_wrap=True)
    for probability in _SCALE:
        table.add_row("(for scale)", "", *_pair(probability))
    for example in examples:
        table.add_row(_plain(example.context)[-48:], _plain(example.token), *_pair(example.probability))
    return table


def _pair(probability: float) -> tuple[str, str]:
    """A probability and its loss; the loss is that of the probability as it is printed."""
    shown = f"{probability:.4g}"
    return shown, f"{surprisal(float(shown)):.3f}"


def _plain(text: str) -> str:
    return repr(text)[1:-1].replace("[", r"\[")


def write_report(
    folder: Path, *, metrics: dict[str, float], tables: Sequence[Table], examples: Sequence[Example]
) -> None:
    """Leave ``report.json`` and ``report.md``, and print the tables."""
    rows = [{**asdict(e), "loss": e.loss} for e in examples]
    (folder / "report.json").write_text(json.dumps({"metrics": metrics, "examples": rows}, indent=1) + "\n")
    console = Console(width=120, record=True)
    for table in tables:
        console.print(table)
    (folder / "report.md").write_text("# Evaluation\n\n```\n" + console.export_text() + "```\n")
