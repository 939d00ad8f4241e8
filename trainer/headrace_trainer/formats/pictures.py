"""Plots of a training run: the loss and every other figure of the objective, over steps.

In: ``history.jsonl``. Out: a PNG; the same history gives the same bytes. Figures on the same scale share a panel.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PICTURE_FILE = "history.png"

TRAINING, HELD_OUT = "#2a78b5", "#c8502d"
_SECOND = "#7a5195"
_SMOOTHED_FROM = 150
"""From this many points on, the running mean is drawn over the noise."""
_COLUMNS = 2
_NO_FIGURES = frozenset({"step", "loss_hex", "lr", "tokens", "skipped", "rolled_back", "kept", "stopped_early"})
_HELD_OUT_PREFIX = "validation_"

Record = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """Figures that share a scale."""

    title: str
    figures: tuple[str, ...]


_PANELS = (
    Panel("loss", ("loss",)),
    Panel("pairs whose chosen side wins", ("accuracy", "rewards/accuracies")),
    Panel("margin of the chosen side", ("margin", "rewards/margins")),
    Panel("implicit reward", ("rewards/chosen", "rewards/rejected")),
    Panel("log-probability, nats an answer", ("logps/chosen", "logps/rejected")),
)
"""Panels by the names of the objectives' figures. Any other figure gets its own panel."""


def draw_history(history: Path, *, name: str, out: Path) -> None:
    """Plot the history of a training stage.

    Args:
        history: ``history.jsonl``.
        name: the stage's kind.
        out: the file to write.
    """
    records = [json.loads(line) for line in history.read_text().splitlines()]
    # No metadata: it would hold matplotlib's version.
    history_figure(records, name=name).savefig(out, metadata={"Software": None})


def history_figure(records: Sequence[Record], *, name: str) -> Figure:
    """One panel per kind of figure in the records."""
    panels = panels_of(records)
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4.6 * min(len(panels), _COLUMNS), 3.1 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, min(len(panels), _COLUMNS), i + 1)
        _draw_panel(axes, panel, records)
    figure.suptitle(f"{name}: {len(records):,} steps", x=0.01, ha="left")
    return figure


def panels_of(records: Sequence[Record]) -> list[Panel]:
    """The panels that the records have figures for, known ones first."""
    found = {key for record in records for key in record if key not in _NO_FIGURES}
    found = {key.removeprefix(_HELD_OUT_PREFIX) for key in found}
    known = [Panel(p.title, tuple(f for f in p.figures if f in found)) for p in _PANELS]
    named = {figure for panel in known for figure in panel.figures}
    others = [Panel(key.replace("_", " "), (key,)) for key in sorted(found - named)]
    return [panel for panel in known if panel.figures] + others


def _draw_panel(axes: Axes, panel: Panel, records: Sequence[Record]) -> None:
    for figure, color in zip(panel.figures, (TRAINING, _SECOND), strict=False):
        label = figure.rpartition("/")[2] if len(panel.figures) > 1 else "training"
        draw_training(axes, records, figure=figure, label=label, color=color)
        if len(panel.figures) == 1:
            draw_held_out(axes, records, figure=figure, label="held out")
        else:
            draw_held_out(axes, records, figure=figure, label=f"held out, {label}", color=color)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    axes.legend(frameon=False, fontsize=8)


def draw_training(
    axes: Axes, records: Iterable[Record], *, figure: str = "loss", label: str = "training", color: str = TRAINING
) -> None:
    """Plot a figure over steps, with its running mean if there are many."""
    records = [r for r in records if figure in r]  # a skipped step has none
    steps, values = (np.array([r[key] for r in records]) for key in ("step", figure))
    if len(records) < _SMOOTHED_FROM:
        axes.plot(steps, values, color=color, lw=1.2, label=label)
        return
    width = len(records) // 50 | 1
    mean = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps, values, color=color, lw=0.6, alpha=0.3)
    axes.plot(steps[width // 2 : -(width // 2)], mean, color=color, lw=1.6, label=f"{label} (mean of {width} steps)")


def draw_held_out(
    axes: Axes, records: Iterable[Record], *, figure: str = "loss", label: str, color: str = HELD_OUT
) -> None:
    """Plot a figure of the validation samples at the steps where it was measured."""
    key = f"{_HELD_OUT_PREFIX}{figure}"
    if measured := [(r["step"], r[key]) for r in records if key in r]:
        axes.plot(*zip(*measured, strict=True), "o-", color=color, ms=4, lw=1.2, label=label)
