"""The parts of a dpo stage.

In: a ``StageContext`` with a model. Out: in ``ctx.output``, the model, its history, the tokenizer and the reference
log-probabilities; the final figures as metrics.
"""

from headrace_api.parallelism import layout
from headrace_api.stages import Dpo
from headrace_trainer.engine.assembly import Task, build_loop
from headrace_trainer.engine.finetune import Start, leave_finetuned, num_steps, prepare
from headrace_trainer.engine.loop import Loop
from headrace_trainer.engine.losses import Preference
from headrace_trainer.engine.model.build import check_precision
from headrace_trainer.engine.packs import training_packs, validation_packs
from headrace_trainer.engine.parallel import Gang, join_gang
from headrace_trainer.engine.preference import PairPreference
from headrace_trainer.formats.packs import Packing
from headrace_trainer.formats.records import PAIR_SHAPES
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.dpo.reference import ReferencedSamples, references


def run_dpo(ctx: StageContext) -> dict[str, float]:
    """Train a model on pairs of answers. Every rank of the gang calls.

    Returns:
        The final losses, how much was read, and how often and by how much the chosen side of held-out pairs wins.

    Raises:
        UserError: bad configuration or data.
        StorageError: storage failed, or no committed checkpoint is whole.
        Stopped: asked to stop; a checkpoint is committed.
    """
    config = ctx.config
    assert isinstance(config, Dpo)
    check_precision(config.precision)
    start = prepare(ctx, template=config.chat_template, allowed=PAIR_SHAPES)
    axes = layout(config.parallelism, num_ranks=ctx.world)
    local_world = ctx.resolved.stage.compute.ranks
    with join_gang(
        axes, rank=ctx.rank, local_rank=ctx.local_rank, local_world=local_world, seed=ctx.resolved.seed
    ) as gang:
        loop = build_dpo(ctx, gang, start)
        loop.resume()
        loop.run()
        return leave_finetuned(ctx, loop, start) | _held_out(loop)


def _held_out(loop: Loop) -> dict[str, float]:
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
    packing = Packing.BEST_FIT if config.packing else Packing.NONE
    found = references(ctx, gang, start)
    capacity = config.sequence_length
    training = training_packs(start.dataset, capacity=capacity, seed=ctx.resolved.seed, packing=packing)
    validation = validation_packs(start.dataset, capacity=capacity, packing=packing)
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
