"""Build the components of a pretrain stage, run the loop, and write the trained model.

In: a ``StageContext`` with token shards. Out, in ``ctx.output``: ``checkpoint/`` (weights, each rank's in its own
files), ``model.json``, ``history.jsonl`` and ``tokenizer/``; the final figures as metrics.
"""

import shutil
from pathlib import Path

from headrace_api.parallelism import layout
from headrace_api.stages import Pretrain
from headrace_trainer.engine import assembly
from headrace_trainer.engine.assembly import Task, final_metrics, leave_model
from headrace_trainer.engine.batches import Samples
from headrace_trainer.engine.documents import NextTokenInDocument
from headrace_trainer.engine.loop import Loop
from headrace_trainer.engine.model.build import check_precision
from headrace_trainer.engine.model.start import fill_start_weights
from headrace_trainer.engine.objective import NextToken
from headrace_trainer.engine.parallel import Gang, join_gang
from headrace_trainer.formats.model_card import TOKENIZER_FOLDER, ModelCard, describe
from headrace_trainer.formats.shards.manifest import read_manifest
from headrace_trainer.formats.shards.reader import TokenDataset
from headrace_trainer.stage import StageContext


def run_pretrain(ctx: StageContext) -> dict[str, float]:
    """Train a model on the stage's shards. Every rank of the gang calls it.

    Returns:
        The final training loss, validation loss and throughput.

    Raises:
        UserError: bad configuration or data.
        StorageError: storage failed, or no committed checkpoint is intact.
        Stopped: on request, after a checkpoint was committed.
    """
    config = ctx.config
    assert isinstance(config, Pretrain)
    check_precision(config.precision)
    shards = ctx.input("shards")
    axes = layout(config.parallelism, num_ranks=ctx.world)
    local_world = ctx.resolved.stage.compute.ranks
    with join_gang(
        axes, rank=ctx.rank, local_rank=ctx.local_rank, local_world=local_world, seed=ctx.resolved.seed
    ) as ranks:
        card = _card(config, shards)
        loop = build_loop(
            ctx,
            ranks,
            card,
            # Already verified when the input was fetched.
            training=TokenDataset(shards, "train", config.sequence_length, ctx.resolved.seed, verify=False),
            validation=TokenDataset(shards, "validation", config.sequence_length, ctx.resolved.seed, verify=False),
        )
        loop.resume()
        loop.run()
        leave_model(ctx.output, loop, card)
        if ranks.is_first:
            shutil.copytree(shards / TOKENIZER_FOLDER, ctx.output / TOKENIZER_FOLDER, dirs_exist_ok=True)
    return final_metrics(loop, card)


def build_loop(ctx: StageContext, gang: Gang, card: ModelCard, *, training: Samples, validation: Samples) -> Loop:
    """Build everything that the loop needs.

    Args:
        ctx: the stage.
        gang: this rank's place; process groups must exist.
        card: the model.
        training: training samples.
        validation: held-out samples.
    """
    config = ctx.config
    assert isinstance(config, Pretrain)
    task = Task(
        config=config,
        steps=config.steps,
        card=card,
        objective=NextTokenInDocument(begins=card.eod_id) if config.document_mask else NextToken(),
        training=training,
        validation=validation,
        fill=lambda model: fill_start_weights(model, card.architecture, seed=ctx.resolved.seed),
    )
    return assembly.build_loop(ctx, gang, task)


def _card(config: Pretrain, shards: Path) -> ModelCard:
    manifest = read_manifest(shards)
    return describe(
        config.model.architecture,
        vocab_size=manifest.vocab_size,
        eod_id=manifest.eod_id,
        sequence_length=config.sequence_length,
        precision=config.precision,
    )
