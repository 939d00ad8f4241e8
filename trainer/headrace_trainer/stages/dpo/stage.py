"""The parts of a dpo stage.

In: a ``StageContext`` with a model. Out: in ``ctx.output``, the model, its history, the tokenizer and the reference
log-probabilities; the final figures as metrics.
"""

from headrace_api.stages import Dpo
from headrace_trainer.engine.assembly import Task, build_loop
from headrace_trainer.engine.finetune import Start, num_steps, run_finetune
from headrace_trainer.engine.loop import Loop
from headrace_trainer.engine.losses import Preference
from headrace_trainer.engine.packs import packs_of
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.preference import PairPreference
from headrace_trainer.formats.records import PAIR_SHAPES
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.dpo.reference import ReferencedSamples, references


def run_dpo(ctx: StageContext) -> dict[str, float]:
    """Train a model on pairs of answers. Every rank of the gang calls; see ``run_finetune``."""
    return run_finetune(ctx, allowed=PAIR_SHAPES, build=build_dpo, measure=_held_out)


def _held_out(loop: Loop, _: Start) -> dict[str, float]:
    """Accuracy and mean margin of the implicit rewards; nothing without held-out pairs."""
    found = {
        name: loop.history.held_out(figure)
        for name, figure in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"))
    }
    return {name: value for name, value in found.items() if value is not None}


def build_dpo(ctx: StageContext, gang: Gang, start: Start) -> Loop:
    """The loop before its first step."""
    config = ctx.config
    assert isinstance(config, Dpo)
    found = references(ctx, gang, start)
    training, validation = packs_of(start.dataset, config, seed=ctx.resolved.seed)
    task = Task(
        config=config,
        steps=num_steps(config, training),
        card=start.card,
        objective=PairPreference(
            kind=Preference(config.loss),
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            by_length=config.length_normalized,
            fixed=gang.layout.pipeline > 1,
        ),
        training=ReferencedSamples(training, found.train),
        validation=ReferencedSamples(validation, found.validation) if validation is not None else None,
        fill=lambda model: start.fill(model, seed=ctx.resolved.seed),
        data=start.digest,
    )
    return build_loop(ctx, gang, task)
