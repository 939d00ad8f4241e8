"""The shards stage: documents and a tokenizer -> token ids in Megatron's .bin/.idx format.

``writer`` writes the shards; ``stage`` runs things in order. The training loop reads them with ``formats.shards``.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> dict[str, float]:
    """Tokenize the corpus of ``ctx.config`` into shards in ``ctx.output``."""
    # Imported late: ranks that read shards need neither tokenizers nor datatrove.
    from headrace_trainer.stages.shards.stage import run_shards

    return run_shards(ctx)
