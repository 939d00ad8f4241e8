"""The sft stage: ``stage`` reads demonstrations and builds the parts; the engine's ``loop`` goes through the steps."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> dict[str, float]:
    """Train a model on demonstrations."""
    # Imported here: Megatron takes ten seconds.
    from headrace_trainer.stages.sft.stage import run_sft

    return run_sft(ctx)
