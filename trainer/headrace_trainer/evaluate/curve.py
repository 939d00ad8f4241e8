"""The picture of a training: loss over steps, the held-out loss, and the unigram baseline's."""

import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_INK, _TRAIN, _HELD_OUT, _BASELINE = "#222222", "#2a78b5", "#c8502d", "#7a7a7a"


def draw_curve(history: Path, *, unigram_loss: float, title: str, out: Path) -> None:
    """Draw the loss curve as a PNG.

    Args:
        history: ``history.jsonl`` of the pretrain stage.
        unigram_loss: the baseline's mean loss on held-out text, in nats a token.
        title: what was trained.
        out: where the picture goes.
    """
    records = [json.loads(line) for line in history.read_text().splitlines()]
    held_out = [(r["tokens"], r["validation_loss"]) for r in records if "validation_loss" in r]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes.plot([r["tokens"] for r in records], [r["loss"] for r in records], color=_TRAIN, lw=1, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color=_HELD_OUT, ms=4, lw=1.2, label="held-out text")
    axes.axhline(unigram_loss, color=_BASELINE, ls="--", lw=1.2, label="unigram baseline")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("loss, nats per token")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.set_title(title, loc="left", color=_INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _add_perplexity_axis(axes)
    axes.legend(frameon=False)
    figure.savefig(out, metadata={"Software": None})
    plt.close(figure)


def _add_perplexity_axis(axes: plt.Axes) -> None:
    """The same curve read as perplexity: its ticks are exp(loss)."""
    right = axes.twinx()
    right.set_ylim(*axes.get_ylim())
    low, high = axes.get_ylim()
    marks = [p for p in (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000) if low <= math.log(p) <= high]
    right.set_yticks([math.log(p) for p in marks], [f"{p:,}" for p in marks])
    right.set_ylabel("perplexity")
    right.spines[["top", "left"]].set_visible(False)
