"""The pretrain stage: ``stage`` builds the components, and the engine's ``loop`` runs the steps."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> dict[str, float]:
    """Train a model on the shards of the stage."""
    # Imported late: Megatron takes ten seconds.
    from headrace_trainer.stages.pretrain.stage import run_pretrain

    return run_pretrain(ctx)
