"""The shards stage: documents and a tokenizer -> token ids in Megatron's .bin/.idx form, and the reader of them.

``split`` says which documents are for validation, ``writer`` cuts shards, ``manifest`` lists them with digests,
``stage`` puts them in order. ``reader`` gives samples to the training loop in the order that ``order`` decides.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> dict[str, float]:
    """Tokenize the corpus of ``ctx.config`` into shards in ``ctx.output``."""
    # Imported here: ranks that read shards need neither tokenizers nor datatrove.
    from headrace_trainer.shards.stage import run_shards

    return run_shards(ctx)
