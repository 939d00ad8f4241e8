"""Figures that must not go too far, and what follows where one does: decided from the history alone. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from headrace_api.stages.rl import Rail, RailAction, Rails
from headrace_trainer.engine.hooks import Alarm

WINDOW = 100
"""Steps within which going back must have helped."""

_WATCHED = {
    "maxKl": ("objective/kl", "raise kl.coefficient, or lower schedule.learningRate"),
    "minEntropy": ("entropy", "raise temperature or kl.coefficient, or lower schedule.learningRate"),
    "maxLengthShare": ("completions/clipped_ratio", "raise maxNewTokens, or reward shorter answers"),
    "maxZeroVarianceShare": ("frac_reward_zero_std", "take harder or easier prompts, or a reward with more values"),
    "maxMismatch": ("train_rollout_logprob_abs_diff", "see that sampling and training run in the same precision"),
}
"""The figure of each rail, and what can be done about it."""


def alarm(records: Sequence[Mapping[str, Any]], rails: Rails) -> Alarm | None:
    """The first rail that the newest step has left.

    Args:
        records: the history, a step each.
        rails: the limits.
    """
    newest = records[-1]
    went_back = any("rolled_back" in record for record in records[-WINDOW:])
    for name, rail in _set(rails).items():
        figure, remedy = _WATCHED[name]
        value = newest.get(figure)
        if value is not None and (value < rail.limit if name.startswith("min") else value > rail.limit):
            relation = "below" if name.startswith("min") else "above"
            again = ", again after going back" if went_back and rail.then is RailAction.ROLL_BACK else ""
            return Alarm(
                reason=f"{figure} is {value:.4g}, {relation} rails.{name}.limit, {rail.limit:g}{again}: {remedy}, "
                "or move the limit",
                roll_back=rail.then is RailAction.ROLL_BACK and not went_back,
            )
    return None


def _set(rails: Rails) -> dict[str, Rail]:
    fields = type(rails).model_fields
    return {fields[name].alias or name: rail for name in fields if (rail := getattr(rails, name)) is not None}
