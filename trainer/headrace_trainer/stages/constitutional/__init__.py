"""The constitutional stage: ``constitution`` reads and draws principles, ``asking`` words the questions, ``speakers`` and
``endpoint`` answer them, ``revising`` and ``comparing`` make transcripts of a unit of prompts, ``units`` keeps them, and
``report`` shows them. ``stage`` goes through the units."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> dict[str, float]:
    """Write records of a model's answers, criticized and revised, or compared."""
    # Imported here: Megatron takes ten seconds.
    from headrace_trainer.stages.constitutional.stage import run_constitutional

    return run_constitutional(ctx)
