"""The pretrain stage: ``pretrain`` builds the parts, ``loop`` goes through the steps.

``schedule``, ``batches``, ``history`` and ``pace`` need no Megatron; it is imported when a stage runs.
"""

from headrace_trainer.stage import StageContext


def run(ctx: StageContext) -> dict[str, float]:
    """Train a model on the shards of the stage: see ``pretrain.run``."""
    from headrace_trainer.train import pretrain

    return pretrain.run(ctx)
