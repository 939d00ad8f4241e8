"""The tokenizer stage: cleaned documents, or an existing tokenizer's files -> a tokenizer in Hugging Face format.

``train`` learns byte-level BPE, ``importing`` reads other formats, ``stage`` chooses; ``formats.tokenizer`` reads and
writes the artifact.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> dict[str, float]:
    """Train or import the tokenizer of ``ctx.config`` into ``ctx.output``."""
    # Imported late: loading a tokenizer does not need the stage.
    from headrace_trainer.stages.tokenizer.stage import run_tokenizer

    return run_tokenizer(ctx)
