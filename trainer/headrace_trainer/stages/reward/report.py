"""How far a reward model's scores can be trusted, on pairs that it was not trained on.

In: the scores of both sides. Out: accuracy, calibration by predicted probability, and whether longer answers win because
they are longer.
"""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

_BINS = 5


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Pairs whose more likely side is predicted with about the same probability."""

    least: float
    most: float
    pairs: int
    predicted: float
    """Mean predicted probability; none (0) without pairs."""
    right: float
    """Share of the pairs where the prediction is right."""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What the report says."""

    pairs: int
    accuracy: float
    margin: float
    """Mean score of the chosen side less that of the rejected one."""
    calibration: tuple[Calibrated, ...]
    longer_is_chosen: float
    """Share of the pairs of different lengths whose chosen side is the longer one."""
    longer_is_scored_higher: float
    """The same of the model's scores: far above the one before, it scores length."""
    length_correlation: float
    """Pearson's, of the differences in score and in length."""


def assess(scores_N2: np.ndarray, lengths_N2: np.ndarray) -> Trust:
    """Measure.

    Args:
        scores_N2: of the chosen and the rejected sides.
        lengths_N2: tokens of them.
    """
    margins, longer = scores_N2[:, 0] - scores_N2[:, 1], lengths_N2[:, 0] - lengths_N2[:, 1]
    differ = longer != 0
    return Trust(
        pairs=len(margins),
        accuracy=float((margins > 0).mean()),
        margin=float(margins.mean()),
        calibration=tuple(_calibration(margins)),
        longer_is_chosen=float((longer[differ] > 0).mean()) if differ.any() else 0.5,
        longer_is_scored_higher=float((margins[differ] * longer[differ] > 0).mean()) if differ.any() else 0.5,
        length_correlation=_correlation(margins, longer),
    )


def _calibration(margins: np.ndarray) -> list[Calibrated]:
    # The probability of the side that the model prefers (arXiv 2203.02155, eq. 1), whichever it is.
    probabilities, edges = 1 / (1 + np.exp(-np.abs(margins.astype(np.float64)))), np.linspace(0.5, 1, _BINS + 1)
    found = []
    for least, most in pairwise(edges):
        inside = (probabilities >= least) & ((probabilities < most) | (most == 1))
        count = int(inside.sum())
        predicted = float(probabilities[inside].mean()) if count else 0.0
        right = float((margins[inside] > 0).mean()) if count else 0.0
        found.append(Calibrated(least=float(least), most=float(most), pairs=count, predicted=predicted, right=right))
    return found


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    if len(one) < 2 or one.std() == 0 or other.std() == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])


def write_report(trust: Trust, folder: Path) -> None:
    """``reward.json``, and ``reward.md`` for people."""
    (folder / "reward.json").write_text(json.dumps(asdict(trust), indent=1))
    rows = [
        f"| {c.least:.1f} to {c.most:.1f} | {c.pairs:,} | {c.predicted:.3f} | {c.right:.3f} |"
        for c in trust.calibration
        if c.pairs
    ]
    lines = [
        f"# Reward model on {trust.pairs:,} held-out pairs",
        "",
        f"The chosen side scores higher in {trust.accuracy:.1%} of them, by {trust.margin:.3f} on average.",
        "",
        "| predicted probability of the preferred side | pairs | predicted | right |",
        "|---|---|---|---|",
        *rows,
        "",
        f"The longer side is the chosen one in {trust.longer_is_chosen:.1%} of the pairs, and is scored higher in "
        f"{trust.longer_is_scored_higher:.1%}; differences in score and in length correlate by "
        f"{trust.length_correlation:.2f}.",
    ]
    (folder / "reward.md").write_text("\n".join(lines) + "\n")
