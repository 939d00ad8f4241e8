"""The rl stage: ``rollouts`` draws answers and makes experience of them, ``judges`` reward them, ``rails``
says what went too far, ``stage`` builds the parts; the engine's ``loop`` goes through the steps."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> dict[str, float]:
    """Train a model on its own answers."""
    # Imported here: Megatron takes ten seconds.
    from headrace_trainer.stages.rl.stage import run_rl

    return run_rl(ctx)
