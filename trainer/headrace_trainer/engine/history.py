"""The loss curve: one record a step, kept in every checkpoint, so that it survives the pod."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """Records of the steps so far, in order. Only rank 0's is written."""

    records: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        *,
        step: int,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        tokens: int,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Add a step.

        Args:
            step: the step, counted from 1.
            loss: mean loss over its global batch, in nats.
            metrics: the objective's other figures; those that are not finite are left out.
            grad_norm: norm of the gradient before clipping.
            learning_rate: the step's.
            tokens: tokens trained on so far, this step's included.
        """
        exact = {"loss": loss, "loss_hex": loss.hex(), "grad_norm": grad_norm, "lr": learning_rate}
        self.records.append({"step": step, **exact, "tokens": tokens, **_finite(metrics or {})})

    def add_skipped(self, *, step: int, reason: str, learning_rate: float, tokens: int) -> None:
        """Add a step whose update was left out.

        Args:
            step: the step, counted from 1.
            reason: what was not a finite number.
            learning_rate: the step's.
            tokens: tokens read so far.
        """
        self.records.append({"step": step, "skipped": reason, "lr": learning_rate, "tokens": tokens})

    def roll_back(self, step: int) -> None:
        """Note that the weights are those of an earlier step again."""
        for record in self.records[step:]:
            record["rolled_back"] = True

    def add_validation(self, loss: float, metrics: Mapping[str, float] | None = None) -> None:
        """Note what was measured on the validation split after the newest step."""
        figures = {"loss": loss, **(metrics or {})}
        self.records[-1] |= {f"validation_{name}": value for name, value in _finite(figures).items()}

    def note_best(self) -> bool:
        """Note that the newest record's weights are kept, if their held-out loss is the lowest so far; whether it is."""
        loss, kept = self.records[-1].get("validation_loss"), self._kept
        if loss is None or (kept is not None and loss >= kept["validation_loss"]):
            return False
        self.records[-1]["kept"] = True
        return True

    def note_lost(self, step: int) -> None:
        """Note that the weights of a step are not kept after all: they did not reach storage."""
        if 0 < step <= len(self.records):
            self.records[step - 1].pop("kept", None)

    @property
    def kept_step(self) -> int | None:
        """The step whose weights are kept as the best; None where none are."""
        return None if self._kept is None else int(self._kept["step"])

    @property
    def _kept(self) -> dict[str, Any] | None:
        return next((record for record in reversed(self.records) if "kept" in record), None)

    @property
    def loss(self) -> float | None:
        """The newest training loss."""
        return next((r["loss"] for r in reversed(self.records) if "loss" in r), None)

    def held_out(self, figure: str) -> float | None:
        """A figure on the validation split: of the weights that are kept, or else the newest value."""
        name, kept = f"validation_{figure}", self._kept
        if kept is not None:
            return kept.get(name)
        return next((r[name] for r in reversed(self.records) if name in r), None)

    @property
    def num_left_out(self) -> int:
        """Steps whose update was skipped or taken back."""
        return sum("skipped" in r or "rolled_back" in r for r in self.records)

    @property
    def validation_loss(self) -> float | None:
        """The validation loss of the weights that are kept, or else the newest."""
        return self.held_out("loss")

    def dumps(self) -> str:
        """One JSON object a line."""
        return "".join(json.dumps(record, allow_nan=False) + "\n" for record in self.records)

    @classmethod
    def loads(cls, text: str) -> "History":
        """What ``dumps`` gave."""
        return cls([json.loads(line) for line in text.splitlines()])


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures that JSON can hold."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}
