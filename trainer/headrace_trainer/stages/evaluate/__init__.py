"""The evaluate stage: how well a model predicts held-out text, compared with a unigram model.

``measures`` is arithmetic, ``losses`` runs the model, ``unigram`` is the baseline, ``report`` and ``curve`` show the
results. ``stage`` runs them in order and checks the requirements.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> dict[str, float]:
    """Measure the model of ``ctx.input("model")`` on the validation split of ``ctx.input("shards")``."""
    from headrace_trainer.stages.evaluate.stage import run_evaluate

    return run_evaluate(ctx)
