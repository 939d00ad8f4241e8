"""The dpo stage: ``reference`` says what the starting model thinks of the pairs, ``stage`` builds the parts; the
engine's ``loop`` goes through the steps."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> dict[str, float]:
    """Train a model on pairs of answers."""
    # Imported here: Megatron takes ten seconds.
    from headrace_trainer.stages.dpo.stage import run_dpo

    return run_dpo(ctx)
