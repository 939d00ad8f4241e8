"""The loss curve: one record a step, kept in every checkpoint, so that it survives the pod."""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """Records of the steps so far, in order. Only rank 0's is written."""

    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, *, step: int, loss: float, grad_norm: float, learning_rate: float, tokens: int) -> None:
        """Add a step.

        Args:
            step: the step, counted from 1.
            loss: mean token loss over its global batch, in nats.
            grad_norm: norm of the gradient before clipping.
            learning_rate: the step's.
            tokens: tokens trained on so far, this step's included.
        """
        exact = {"loss": loss, "loss_hex": loss.hex(), "grad_norm": grad_norm, "lr": learning_rate}
        self.records.append({"step": step, **exact, "tokens": tokens})

    def add_validation(self, loss: float) -> None:
        """Note the validation loss after the newest step."""
        self.records[-1]["validation_loss"] = loss

    @property
    def validation_loss(self) -> float | None:
        """The newest validation loss."""
        found = (r["validation_loss"] for r in reversed(self.records) if "validation_loss" in r)
        return next(found, None)

    def dumps(self) -> str:
        """One JSON object a line."""
        return "".join(json.dumps(record) + "\n" for record in self.records)

    @classmethod
    def loads(cls, text: str) -> "History":
        """What ``dumps`` gave."""
        return cls([json.loads(line) for line in text.splitlines()])
