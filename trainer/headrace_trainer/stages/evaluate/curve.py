"""The loss curve: training loss over steps, held-out loss, and the unigram baseline.

In: ``history.jsonl`` of a pretrain stage. Out: a PNG.
"""

import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: there is no screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from headrace_api.people import people_count
from headrace_trainer.formats.pictures import draw_held_out, draw_training

CURVE_FILE = "loss_curve.png"

_BASELINE = "#6a6a6a"
_PERPLEXITIES = [m * 10**e for e in range(6) for m in (1, 2, 5)]


def draw_curve(history: Path, *, unigram_loss: float, name: str, num_parameters: int, out: Path) -> None:
    """Draw the loss curve as a PNG.

    Args:
        history: ``history.jsonl`` of the pretrain stage.
        unigram_loss: the baseline's mean loss on held-out text, in nats per token.
        name: the run's name.
        num_parameters: the model's size.
        out: the file to write.
    """
    records = [json.loads(line) for line in history.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(8.5, 5), dpi=130, layout="constrained")
    draw_training(axes, records)
    measured = [r["validation_loss"] for r in records if "validation_loss" in r]
    draw_held_out(axes, records, label=f"held-out text ({measured[-1]:.2f} at the end)" if measured else "")
    axes.axhline(unigram_loss, color=_BASELINE, ls="--", lw=1.2, label=f"unigram baseline ({unigram_loss:.2f})")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token")
    axes.set_title(f"{name}: {people_count(num_parameters)} parameters", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    _add_token_axis(axes, tokens_per_step=records[-1]["tokens"] / records[-1]["step"])
    _add_perplexity_axis(axes)
    axes.legend(frameon=False)
    figure.savefig(out, metadata={"Software": None})  # keeps matplotlib's version out of the file
    plt.close(figure)


def _add_token_axis(axes: Axes, *, tokens_per_step: float) -> None:
    functions = (lambda steps: np.multiply(steps, tokens_per_step), lambda tokens: np.divide(tokens, tokens_per_step))
    top = axes.secondary_xaxis("top", functions=functions)
    top.xaxis.set_major_formatter(lambda tokens, _: people_count(tokens))
    top.set_xlabel("tokens trained on")


def _add_perplexity_axis(axes: Axes) -> None:
    """The same curve as perplexity: ticks at exp(loss)."""
    low, high = axes.get_ylim()
    marks = [p for p in _PERPLEXITIES if low <= math.log(p) <= high]
    right = axes.secondary_yaxis("right")
    right.set_yticks([math.log(p) for p in marks], [f"{p:,}" for p in marks])
    right.set_ylabel("perplexity = exp(loss)")
