"""The parts of an sft stage.

In: a ``StageContext`` with a model. Out: in ``ctx.output``, the model, its history and the tokenizer with its chat
template, and what was read and left out; the final figures as metrics.
"""

from headrace_api.stages import Sft
from headrace_trainer.engine.assembly import Task, build_loop
from headrace_trainer.engine.finetune import Start, num_steps, run_finetune
from headrace_trainer.engine.loop import Loop
from headrace_trainer.engine.packs import packs_of
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.supervised import Supervised
from headrace_trainer.formats.records import SFT_SHAPES
from headrace_trainer.stage import StageContext


def run_sft(ctx: StageContext) -> dict[str, float]:
    """Train a model on demonstrations. Every rank of the gang calls; see ``run_finetune``."""
    return run_finetune(ctx, allowed=SFT_SHAPES, build=build_sft)


def build_sft(ctx: StageContext, gang: Gang, start: Start) -> Loop:
    """The loop before its first step."""
    config = ctx.config
    assert isinstance(config, Sft)
    training, validation = packs_of(start.dataset, config, seed=ctx.resolved.seed)
    task = Task(
        config=config,
        steps=num_steps(config, training),
        card=start.card,
        objective=Supervised(fixed=gang.layout.pipeline > 1),
        training=training,
        validation=validation,
        fill=lambda model: start.fill(model, seed=ctx.resolved.seed),
        data=start.digest,
    )
    return build_loop(ctx, gang, task)
