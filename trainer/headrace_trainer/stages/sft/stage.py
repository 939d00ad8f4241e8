"""The parts of an sft stage.

In: a ``StageContext`` with a model. Out: in ``ctx.output``, the model, its history and the tokenizer with its chat
template, and what was read and left out; the final figures as metrics.
"""

from headrace_api.parallelism import layout
from headrace_api.stages import Sft
from headrace_trainer.engine.assembly import Task, build_loop
from headrace_trainer.engine.finetune import Start, leave_finetuned, num_steps, prepare
from headrace_trainer.engine.loop import Loop
from headrace_trainer.engine.model.build import check_precision
from headrace_trainer.engine.packs import training_packs, validation_packs
from headrace_trainer.engine.parallel import Gang, join_gang
from headrace_trainer.engine.supervised import Supervised
from headrace_trainer.formats.packs import Packing
from headrace_trainer.formats.records import SFT_SHAPES
from headrace_trainer.stage import StageContext


def run_sft(ctx: StageContext) -> dict[str, float]:
    """Train a model on demonstrations. Every rank of the gang calls.

    Returns:
        The final losses, how much was read, and how full the samples were.

    Raises:
        UserError: bad configuration or data.
        StorageError: storage failed, or no committed checkpoint is whole.
        Stopped: asked to stop; a checkpoint is committed.
    """
    config = ctx.config
    assert isinstance(config, Sft)
    check_precision(config.precision)
    start = prepare(ctx, template=config.chat_template, allowed=SFT_SHAPES)
    axes = layout(config.parallelism, num_ranks=ctx.world)
    local_world = ctx.resolved.stage.compute.ranks
    with join_gang(
        axes, rank=ctx.rank, local_rank=ctx.local_rank, local_world=local_world, seed=ctx.resolved.seed
    ) as gang:
        loop = build_sft(ctx, gang, start)
        loop.resume()
        loop.run()
        return leave_finetuned(ctx, loop, start)


def build_sft(ctx: StageContext, gang: Gang, start: Start) -> Loop:
    """The loop before its first step."""
    config = ctx.config
    assert isinstance(config, Sft)
    packing = Packing.BEST_FIT if config.packing else Packing.NONE
    samples = training_packs(start.dataset, capacity=config.sequence_length, seed=ctx.resolved.seed, packing=packing)
    task = Task(
        config=config,
        steps=num_steps(config, samples),
        card=start.card,
        objective=Supervised(fixed=gang.layout.pipeline > 1),
        training=samples,
        validation=validation_packs(start.dataset, capacity=config.sequence_length, packing=packing),
        fill=lambda model: start.fill(model, seed=ctx.resolved.seed),
        data=start.digest,
    )
    return build_loop(ctx, gang, task)
