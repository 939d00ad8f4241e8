"""The parts of a reward stage.

In: a ``StageContext`` with a model. Out: in ``ctx.output``, the model with its scalar head, its history, the tokenizer and a
report on held-out pairs; the final figures as metrics.
"""

import numpy as np
import torch

from headrace_api.parallelism import layout
from headrace_api.stages import Reward
from headrace_trainer.engine.assembly import Task, build_loop
from headrace_trainer.engine.finetune import Start, leave_finetuned, num_steps, prepare
from headrace_trainer.engine.forward import forward_passes
from headrace_trainer.engine.loop import Loop
from headrace_trainer.engine.model.build import Head, check_precision
from headrace_trainer.engine.packed import PackedBatch
from headrace_trainer.engine.packs import training_packs, validation_packs, values_of_pairs
from headrace_trainer.engine.parallel import Gang, join_gang
from headrace_trainer.engine.scoring import PairScores
from headrace_trainer.formats.packs import Packing
from headrace_trainer.formats.records import PAIR_SHAPES
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.reward.report import Trust, assess, write_report


def run_reward(ctx: StageContext) -> dict[str, float]:
    """Train a model that scores answers. Every rank of the gang calls.

    Returns:
        The final losses, how much was read, and accuracy, mean margin and length bias on held-out pairs.

    Raises:
        UserError: bad configuration or data.
        StorageError: storage failed, or no committed checkpoint is whole.
        Stopped: asked to stop; a checkpoint is committed.
    """
    config = ctx.config
    assert isinstance(config, Reward)
    check_precision(config.precision)
    start = prepare(ctx, template=config.chat_template, allowed=PAIR_SHAPES)
    axes = layout(config.parallelism, num_ranks=ctx.world)
    local_world = ctx.resolved.stage.compute.ranks
    with join_gang(
        axes, rank=ctx.rank, local_rank=ctx.local_rank, local_world=local_world, seed=ctx.resolved.seed
    ) as gang:
        loop = build_reward(ctx, gang, start)
        loop.resume()
        loop.run()
        trust = _assess(loop, start, length=config.sequence_length)
        if gang.is_first and trust is not None:
            write_report(trust, ctx.output)
        return leave_finetuned(ctx, loop, start) | ({} if trust is None else _figures(trust))


def _figures(trust: Trust) -> dict[str, float]:
    return {"accuracy": trust.accuracy, "margin": trust.margin, "lengthCorrelation": trust.length_correlation}


def build_reward(ctx: StageContext, gang: Gang, start: Start) -> Loop:
    """The loop before its first step."""
    config = ctx.config
    assert isinstance(config, Reward)
    packing = Packing.BEST_FIT if config.packing else Packing.NONE
    capacity = config.sequence_length
    training = training_packs(start.dataset, capacity=capacity, seed=ctx.resolved.seed, packing=packing)
    task = Task(
        config=config,
        steps=num_steps(config, training),
        card=start.card,
        objective=PairScores(centering=config.centering, fixed=gang.layout.pipeline > 1),
        training=training,
        validation=validation_packs(start.dataset, capacity=capacity, packing=packing),
        head=Head.SCALAR,
        fill=lambda model: start.fill(model, seed=ctx.resolved.seed, head=Head.SCALAR),
        data=start.digest,
    )
    return build_loop(ctx, gang, task)


def _assess(loop: Loop, start: Start, *, length: int) -> Trust | None:
    """How far the scores can be trusted; None without held-out pairs. Every rank calls."""
    held_out, model = start.dataset.validation, loop.stepper.model
    if held_out is None:
        return None

    def last(rows: list[PackedBatch]) -> list[torch.Tensor]:
        found = forward_passes(model, rows, lambda m, row: (row.run(m), lambda out: out[0, :, 0]), shape=(length,))
        return [row.lasts(row_T[None]) for row, row_T in zip(rows, found, strict=True)]

    scores_N2 = values_of_pairs(held_out, loop.gang, length=length, values=last)
    lengths_N2 = np.array([[len(document) for document in held_out[i]] for i in range(len(held_out))])
    return assess(scores_N2, lengths_N2)
