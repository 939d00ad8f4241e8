"""The reward stage: ``stage`` builds the parts and the engine's ``loop`` goes through the steps; ``report`` says how far
the scores can be trusted."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> dict[str, float]:
    """Train a model that scores answers."""
    # Imported here: Megatron takes ten seconds.
    from headrace_trainer.stages.reward.stage import run_reward

    return run_reward(ctx)
