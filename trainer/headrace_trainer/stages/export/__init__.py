"""The export stage: a Megatron checkpoint -> a folder that transformers and vLLM load.

``weights`` reads the checkpoint without Megatron or a process group, ``formats.huggingface`` maps tensors to their Hugging
Face names, ``card`` documents where the model comes from, ``parity`` loads what was written; ``stage`` runs them in order.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> dict[str, float]:
    """Export the model of ``ctx.input("model")`` into ``ctx.output``."""
    from headrace_trainer.stages.export.stage import run_export

    return run_export(ctx)
