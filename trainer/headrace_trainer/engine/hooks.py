"""What a stage does around the steps of the loop, where its samples are made while it trains.

Every rank calls each method at the same step. The loop itself knows nothing of rollouts, rewards and rails.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace_trainer.engine.step import Stepper


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A figure that went too far."""

    reason: str
    """Which, how far, and what can be done."""
    roll_back: bool
    """Whether the weights from before are taken first; otherwise people must decide."""


class Hooks:
    """Nothing, unless a stage says so."""

    def before_step(self, first: int, stepper: Stepper) -> None:
        """Make the samples from ``first`` on, if they are not there. Collective."""

    def before_validation(self, size: int, stepper: Stepper) -> None:
        """Do what measuring the first ``size`` held-out samples needs. Collective."""

    def figures(self) -> Mapping[str, float]:
        """Figures for the record of the step that these samples were for; the same on every rank."""
        return {}

    def alarm(self, records: Sequence[Mapping[str, Any]]) -> Alarm | None:
        """What to do about the newest of the history's records: decided from these alone."""
        return None

    def weights_went_back(self) -> None:
        """Forget what was made with weights that were taken back."""

    def dumps(self, first: int) -> dict[str, str]:
        """What a checkpoint keeps besides weights and history, name -> text, where sample ``first`` comes next."""
        return {}

    def loads(self, extras: Mapping[str, str]) -> None:
        """Go on from what ``dumps`` gave."""
