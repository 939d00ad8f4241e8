"""The evaluation report: a table of metrics, and example tokens, expected or not. ``report.json``, ``report.md``.

People check such tables with a calculator. So every printed loss is ``surprisal`` of the printed probability, and every
printed perplexity is ``perplexity`` of the printed loss.

Shapes: N = windows, T = sequence length.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from headrace_trainer.engine.answers import Answered
from headrace_trainer.stages.evaluate.curve import CURVE_FILE
from headrace_trainer.stages.evaluate.measures import perplexity, surprisal

_CONTEXT_TOKENS = 12
_CONTEXT_CHARACTERS = 48
_SHOWN = 4
_ANSWERS_SHOWN = 10
_SCALE = (0.9, 0.5, 0.1, 0.01)
"""Probabilities shown to give a feeling for losses."""
_EXPLANATION = """\
The loss is the mean of -log p over held-out tokens, where p is the probability that the model gave to the token that
actually followed. Perplexity is exp(loss): the model is as unsure as if it chose between that many equally likely
tokens. The unigram baseline knows only how often each token occurs; a model that learned from context is well
below it.
"""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One token, and how much the model expected it."""

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
    """The most expected tokens, some typical ones, and the least expected.

    Args:
        losses_NT: each token's loss, in nats.
        tokens_NT: the predicted tokens.
        tokenizer: decodes them.
    """
    # A window's first tokens have too little context to show.
    skipped = min(_CONTEXT_TOKENS, losses_NT.shape[1] // 2)
    eligible_NT = losses_NT[:, skipped:]
    order = np.argsort(eligible_NT, axis=None, kind="stable")
    middle = len(order) // 2
    picked = np.concatenate([order[:_SHOWN], order[middle : middle + _SHOWN], order[-_SHOWN:]])
    places = zip(*np.unravel_index(picked, eligible_NT.shape), strict=True)
    return [_example(losses_NT[n], tokens_NT[n], tokenizer, int(t) + skipped) for n, t in places]


def _example(losses_T: NDArray[np.float32], tokens_T: NDArray[np.int64], tokenizer: Tokenizer, t: int) -> Example:
    context = tokenizer.decode(tokens_T[max(0, t - _CONTEXT_TOKENS) : t].tolist(), skip_special_tokens=False)
    token = tokenizer.decode([int(tokens_T[t])], skip_special_tokens=False)
    return Example(context=context, token=token, probability=float(np.exp(-np.float64(losses_T[t]))))


def figures_table(metrics: dict[str, float]) -> Table:
    """Loss and perplexity of the model, beside the baseline's."""
    table = Table(title="Held-out text", title_justify="left")
    for column in ("", "loss (nats per token)", "perplexity = exp(loss)", "bits per byte"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    table.add_row("model", *_with_perplexity(metrics["loss"]), f"{metrics['bitsPerByte']:.4f}")
    table.add_row("unigram baseline", *_with_perplexity(metrics["unigramLoss"]), "")
    table.add_row("baseline / model", "", f"{metrics['unigramRatio']:.2f}", "")
    return table


def _with_perplexity(loss: float) -> tuple[str, str]:
    shown = f"{loss:.6f}"
    return shown, f"{perplexity(float(shown)):.2f}"


def examples_table(examples: Sequence[Example]) -> Table:
    """Tokens with their probability and the loss that follows from it."""
    table = Table(title="What a loss means: -log of the probability of the token that came", title_justify="left")
    for column in ("context", "token", "probability", "loss"):
        table.add_column(column, justify="right" if column in ("probability", "loss") else "left", no_wrap=True)
    for probability in _SCALE:
        table.add_row("(for scale)", "", *_with_loss(probability))
    for example in examples:
        context = _plain(example.context)[-_CONTEXT_CHARACTERS:]
        # Text, because brackets in a string would be parsed as markup.
        table.add_row(Text(context), Text(_plain(example.token)), *_with_loss(example.probability))
    return table


def _with_loss(probability: float) -> tuple[str, str]:
    shown = f"{probability:.4g}"
    return shown, f"{surprisal(float(shown)):.3f}"


def _plain(text: str) -> str:
    """Text on one line."""
    return repr(text)[1:-1]


def answers_table(name: str, given: Sequence[Answered]) -> Table:
    """The first answers, the right ones, and the share of all answers that are right."""
    right = sum(answer.is_right for answer in given)
    title = f"{name}: {right} of {len(given)} answered right ({right / len(given):.1%})"
    table = Table(title=title, title_justify="left")
    for column in ("question", "right answer", "answer", ""):
        table.add_column(column, no_wrap=bool(column))
    for answer in given[:_ANSWERS_SHOWN]:
        texts = (answer.question, answer.right, answer.said if answer.ended else f"{answer.said} ...")
        table.add_row(*(Text(_plain(text)) for text in texts), "✔" if answer.is_right else "✘")
    return table


def write_report(
    folder: Path,
    *,
    metrics: dict[str, float],
    examples: Sequence[Example],
    answers: Mapping[str, Sequence[Answered]],
    curve: bool,
) -> None:
    """Print the tables, and write ``report.json`` and ``report.md``.

    Args:
        folder: the folder to write to.
        metrics: all figures.
        examples: tokens of the held-out text.
        answers: the answers to each question set, by metric.
        curve: whether the folder has a loss curve.
    """
    content: dict[str, object] = {"metrics": metrics, "examples": [{**asdict(e), "loss": e.loss} for e in examples]}
    if answers:
        content["answers"] = {
            name: [{**asdict(a), "isRight": a.is_right} for a in given] for name, given in answers.items()
        }
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    console = Console(width=120, record=True)
    console.print(figures_table(metrics), examples_table(examples))
    console.print(*(answers_table(name, given) for name, given in answers.items()), end="")
    picture = f"![loss curve]({CURVE_FILE})\n\n" if curve else ""
    text = f"# Evaluation\n\n{_EXPLANATION}\n{picture}```\n{console.export_text()}```\n"
    (folder / "report.md").write_text(text)
