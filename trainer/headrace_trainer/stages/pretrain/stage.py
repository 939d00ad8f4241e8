"""Build the components of a pretrain stage, run the loop, and write the trained model.

In: a ``StageContext`` with token shards. Out, in ``ctx.output``: ``checkpoint/`` (weights, each rank's in its own
files), ``model.json``, ``history.jsonl`` and ``tokenizer/``; the final figures as metrics.
"""

import math
import shutil
import sys
from pathlib import Path

from headrace_api.artifact import resume_identity
from headrace_api.parallelism import layout
from headrace_api.stages import Pretrain
from headrace_trainer.engine.batches import Batches, Samples
from headrace_trainer.engine.checkpoint.checkpointer import Checkpointer
from headrace_trainer.engine.checkpoint.state import TrainState, save_weights
from headrace_trainer.engine.loop import Loop
from headrace_trainer.engine.model.build import build_model, check_precision
from headrace_trainer.engine.model.start import fill_start_weights
from headrace_trainer.engine.objective import NextToken
from headrace_trainer.engine.optimizer import build_optimizer, wrap_model
from headrace_trainer.engine.parallel import Gang, join_gang
from headrace_trainer.engine.step import Stepper
from headrace_trainer.formats.model_card import (
    CHECKPOINT_FOLDER,
    HISTORY_FILE,
    TOKENIZER_FOLDER,
    ModelCard,
    describe,
    write_card,
)
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
    axes = layout(config.parallelism, config.model.architecture, num_ranks=ctx.world)
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


def build_loop(ctx: StageContext, ranks: Gang, card: ModelCard, *, training: Samples, validation: Samples) -> Loop:
    """Build everything that the loop needs.

    Args:
        ctx: the stage.
        ranks: this rank's place; process groups must exist.
        card: the model.
        training: training samples.
        validation: held-out samples.
    """
    config = ctx.config
    assert isinstance(config, Pretrain)
    model = build_model(
        card.architecture,
        gang=ranks,
        vocab_size=card.vocab_size,
        sequence_length=config.sequence_length,
        precision=config.precision,
        fp8_recipe=config.fp8_recipe,
    )
    wrapped, objective = wrap_model(model), NextToken()
    optimizer = build_optimizer(wrapped, config.optimizer, schedule=config.schedule, precision=config.precision)
    stepper = Stepper(
        gang=ranks,
        model=wrapped,
        optimizer=optimizer,
        objective=objective,
        sequence_length=config.sequence_length,
        micro_batch_size=config.micro_batch_size,
        weight_decay=config.optimizer.weight_decay,
    )

    def start() -> None:
        fill_start_weights(model, card.architecture, seed=ctx.resolved.seed)
        optimizer.reload_model_params()  # its fp32 weights are copies

    def batches(samples: Samples) -> Batches:
        return Batches(samples=samples, objective=objective, gang=ranks, micro_batch_size=config.micro_batch_size)

    state = TrainState(model=model, optimizer=optimizer)
    return Loop(
        config=config,
        gang=ranks,
        host=ctx,
        stepper=stepper,
        training=batches(training),
        validation=batches(validation),
        checkpointer=_checkpointer(ctx, ranks, config, state),
        state=state,
        start=start,
    )


def leave_model(output: Path, loop: Loop, card: ModelCard) -> None:
    """Write the trained model to the stage's output. Every rank calls it."""
    loop.host.report(phase="Saving")
    folder, ranks = output / CHECKPOINT_FOLDER, loop.gang
    if ranks.local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # an earlier write may have been interrupted
    ranks.barrier()
    save_weights(loop.state.model, folder)
    if ranks.is_first:
        write_card(card, output)
        (output / HISTORY_FILE).write_text(loop.history.dumps())


def final_metrics(loop: Loop, card: ModelCard) -> dict[str, float]:
    """The final metrics of the stage."""
    metrics = {
        "steps": float(loop.step),
        "tokensIn": float(loop.step * loop.config.tokens_per_step),
        "parameters": float(card.architecture.num_parameters(card.vocab_size)),
        "skippedSteps": float(loop.history.num_left_out),
    }
    if (loss := loop.history.loss) is not None:
        metrics["loss"] = loss
    if (loss := loop.history.validation_loss) is not None:
        metrics["validationLoss"] = loss
        if loss < math.log(sys.float_info.max):  # a diverged model's perplexity may overflow
            metrics["validationPerplexity"] = math.exp(loss)
    if (speed := loop.pace.tokens_per_second) is not None:
        metrics["tokensPerSecond"] = speed
    return metrics


def _card(config: Pretrain, shards: Path) -> ModelCard:
    manifest = read_manifest(shards)
    return describe(
        config.model.architecture,
        vocab_size=manifest.vocab_size,
        eod_id=manifest.eod_id,
        sequence_length=config.sequence_length,
        precision=config.precision,
    )


def _checkpointer(ctx: StageContext, ranks: Gang, config: Pretrain, state: TrainState) -> Checkpointer:
    resolved = ctx.resolved
    inputs = {slot: ref.digest for slot, ref in resolved.inputs.items()}
    return Checkpointer(
        state,
        store=ctx.store,
        scratch=ctx.scratch,
        gang=ranks,
        stage=resolved.stage.name,
        identity=resume_identity(config, seed=resolved.seed, inputs=inputs),
        attempt=resolved.attempt,
        steps=config.steps,
        settings=config.checkpoint,
    )
