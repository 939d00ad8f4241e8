"""The loop of a stage, put together from its parts, and what it leaves when it is through.

In: a ``StageContext``, this rank's place, and a ``Task``: what the stage trains, and on what. Out: a ``Loop`` before its
first step; afterwards ``checkpoint/`` (weights, each rank its own files), ``model.json`` and ``history.jsonl`` in the
stage's output, and the figures that it ends with.
"""

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from headrace_api.artifact import resume_identity
from headrace_api.stages import Finetune, OfflineFinetune, Training
from headrace_trainer.engine.batches import Batches, Samples
from headrace_trainer.engine.checkpoint.checkpointer import Checkpointer
from headrace_trainer.engine.checkpoint.state import TrainState, save_weights
from headrace_trainer.engine.device.megatron import MegatronModule
from headrace_trainer.engine.hooks import Hooks
from headrace_trainer.engine.loop import Loop
from headrace_trainer.engine.model.build import Head, build_model
from headrace_trainer.engine.model.lora import add_adapters, fill_adapters
from headrace_trainer.engine.model.scalar_head import without_value_head
from headrace_trainer.engine.objective import Objective
from headrace_trainer.engine.optimizer import build_optimizer, wrap_model
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.step import Stepper
from headrace_trainer.formats.model_card import CHECKPOINT_FOLDER, HISTORY_FILE, ModelCard, write_card
from headrace_trainer.stage import StageContext


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a stage trains, and on what."""

    config: Training
    steps: int
    card: ModelCard
    objective: Objective
    training: Samples
    validation: Samples | None
    head: Head = Head.LANGUAGE_MODEL
    fill: Callable[[MegatronModule], None]
    """Sets the weights that the model starts with."""
    hooks: Hooks = field(default_factory=Hooks)
    """What the stage does around steps."""
    data: str = ""
    """Digest of the samples where the stage reads them from files of the user's: another makes another training."""


def build_loop(ctx: StageContext, gang: Gang, task: Task) -> Loop:
    """Everything between the configuration and the first step.

    Args:
        ctx: the stage.
        gang: this rank's place; process groups must exist.
        task: what is trained.
    """
    config, objective = task.config, task.objective
    model = build_model(
        task.card.architecture,
        gang=gang,
        vocab_size=task.card.vocab_size,
        sequence_length=config.sequence_length,
        precision=config.precision,
        fp8_recipe=config.fp8_recipe,
        head=task.head,
    )
    adapter = config.adapter if isinstance(config, Finetune) else None
    if adapter is not None:
        task.fill(model)
        add_adapters(model, adapter.lora)
    wrapped = wrap_model(model)
    optimizer = build_optimizer(wrapped, config.optimizer, schedule=config.schedule, precision=config.precision)
    rows, row_length = objective.shape(config.micro_batch_size, config.sequence_length)
    stepper = Stepper(
        gang=gang,
        model=wrapped,
        optimizer=optimizer,
        objective=objective,
        sequence_length=row_length,
        micro_batch_size=rows,
        weight_decay=config.optimizer.weight_decay,
    )

    def start() -> None:
        if adapter is None:
            task.fill(model)
        else:
            fill_adapters(model, seed=ctx.resolved.seed)
        optimizer.reload_model_params()  # its fp32 weights are copies

    def batches(samples: Samples) -> Batches:
        return Batches(samples=samples, objective=objective, gang=gang, micro_batch_size=config.micro_batch_size)

    state = TrainState(model=model, optimizer=optimizer)
    offline = config if isinstance(config, OfflineFinetune) else None
    return Loop(
        config=config,
        steps=task.steps,
        gang=gang,
        host=ctx,
        stepper=stepper,
        training=batches(task.training),
        validation=batches(task.validation) if task.validation is not None else None,
        checkpointer=_checkpointer(ctx, gang, task, state),
        state=state,
        start=start,
        hooks=task.hooks,
        early_stop=offline.early_stop if offline is not None else None,
        keeps_best=offline is not None and offline.keeps_best,
    )


def leave_model(output: Path, loop: Loop, card: ModelCard) -> None:
    """Write the trained model, its history and a picture of that into the stage's output. Every rank calls."""
    loop.host.report(phase="Saving")
    folder, gang = output / CHECKPOINT_FOLDER, loop.gang
    if gang.local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # ranks may have been restarted in the middle of an earlier write
    gang.barrier()
    save_weights(without_value_head(loop.state.model), folder)
    if gang.is_first:
        write_card(card, output)
        (output / HISTORY_FILE).write_text(loop.history.dumps())
        # Imported here: only one rank draws.
        from headrace_trainer.formats.pictures import PICTURE_FILE, draw_history

        draw_history(output / HISTORY_FILE, name=loop.config.KIND, out=output / PICTURE_FILE)


def final_metrics(loop: Loop, card: ModelCard) -> dict[str, float]:
    """The figures that a finished stage shows."""
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
        if loss < math.log(sys.float_info.max):  # a model that diverged may have a perplexity that no float holds
            metrics["validationPerplexity"] = math.exp(loss)
    if (kept := loop.history.kept_step) is not None:
        metrics["keptStep"] = float(kept)
    if loop.early_stop is not None:
        metrics["stoppedEarly"] = float(loop.step < loop.steps)
    if (speed := loop.pace.tokens_per_second) is not None:
        metrics["tokensPerSecond"] = speed
    return metrics


def _checkpointer(ctx: StageContext, gang: Gang, task: Task, state: TrainState) -> Checkpointer:
    resolved = ctx.resolved
    inputs = {slot: ref.digest for slot, ref in resolved.inputs.items()}
    if task.data:
        inputs["data"] = task.data
    return Checkpointer(
        state,
        store=ctx.store,
        scratch=ctx.scratch,
        gang=gang,
        stage=resolved.stage.name,
        identity=resume_identity(task.config, seed=resolved.seed, inputs=inputs),
        attempt=resolved.attempt,
        steps=task.steps,
        settings=task.config.checkpoint,
    )
