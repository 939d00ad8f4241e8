"""The parts of a reward stage.

In: a ``StageContext`` with a model. Out: in ``ctx.output``, the model with its scalar head, its history, the tokenizer and a
report on held-out pairs; the final figures as metrics.
"""

import numpy as np
import torch

from headrace_api.stages import Reward
from headrace_trainer.engine.assembly import Task, build_loop
from headrace_trainer.engine.finetune import Start, num_steps, run_finetune
from headrace_trainer.engine.forward import forward_passes
from headrace_trainer.engine.loop import Loop
from headrace_trainer.engine.model.build import Head
from headrace_trainer.engine.packed import PackedBatch
from headrace_trainer.engine.packs import packs_of, values_of_documents
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.scoring import PairScores
from headrace_trainer.formats.records import PAIR_SHAPES
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.reward.report import Trust, assess, write_report


def run_reward(ctx: StageContext) -> dict[str, float]:
    """Train a model that scores answers. Every rank of the gang calls; see ``run_finetune``."""

    def measure(loop: Loop, start: Start) -> dict[str, float]:
        trust = _assess(loop, start)
        if trust is None:
            return {}
        if loop.gang.is_first:
            write_report(trust, ctx.output)
        return {"accuracy": trust.accuracy, "margin": trust.margin, "lengthCorrelation": trust.length_correlation}

    return run_finetune(ctx, allowed=PAIR_SHAPES, build=build_reward, measure=measure)


def build_reward(ctx: StageContext, gang: Gang, start: Start) -> Loop:
    """The loop before its first step."""
    config = ctx.config
    assert isinstance(config, Reward)
    training, validation = packs_of(start.dataset, config, seed=ctx.resolved.seed)
    task = Task(
        config=config,
        steps=num_steps(config, training),
        card=start.card,
        objective=PairScores(centering=config.centering, fixed=gang.layout.pipeline > 1),
        training=training,
        validation=validation,
        head=Head.SCALAR,
        fill=lambda model: start.fill(model, seed=ctx.resolved.seed, head=Head.SCALAR),
        data=start.digest,
    )
    return build_loop(ctx, gang, task)


def _assess(loop: Loop, start: Start) -> Trust | None:
    """How far the scores can be trusted; None without held-out pairs. Every rank calls."""
    held_out, model, length = start.dataset.validation, loop.stepper.model, loop.config.sequence_length
    if held_out is None:
        return None

    def last(rows: list[PackedBatch]) -> list[torch.Tensor]:
        found = forward_passes(model, rows, lambda m, row: (row.run(m), lambda out: out[0, :, 0]), shape=(length,))
        return [row.lasts(row_T[None]) for row, row_T in zip(rows, found, strict=True)]

    scores_N2 = values_of_documents(held_out, loop.gang, each=2, length=length, values=last)
    lengths_N2 = np.array([[len(document) for document in held_out[i]] for i in range(len(held_out))])
    return assess(scores_N2, lengths_N2)
