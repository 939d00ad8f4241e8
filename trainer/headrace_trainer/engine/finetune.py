"""What the stages after pretraining do alike: the model that they start from, their records, their steps.

In: a ``StageContext`` whose input is a model. Out: a ``Start``: the model's card and tokenizer with a chat template, and
the records as units on this node; and, once the loop is through, the stage's output.
"""

import json
import math
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from headrace_api.artifact import canonical_digest
from headrace_api.model import padded_vocab
from headrace_api.parallelism import layout
from headrace_api.stages import Finetune, StartsFromModel
from headrace_api.stages.finetune import Sampled
from headrace_trainer.engine.adapter_files import write_adapter
from headrace_trainer.engine.assembly import final_metrics, leave_model
from headrace_trainer.engine.batches import Samples
from headrace_trainer.engine.device.megatron import MegatronModule
from headrace_trainer.engine.loop import Loop
from headrace_trainer.engine.model.build import Head, build_model, check_precision
from headrace_trainer.engine.model.lora import merge_adapters
from headrace_trainer.engine.model.start import fill_start_weights
from headrace_trainer.engine.origin import Origin, Pretrained, find_origin
from headrace_trainer.engine.parallel import Gang, join_gang
from headrace_trainer.engine.samples import Comparison
from headrace_trainer.errors import UserError
from headrace_trainer.formats.chat import Encoder, with_chat_template
from headrace_trainer.formats.chat.tokens import load
from headrace_trainer.formats.dataset import Dataset, load_dataset, other_columns
from headrace_trainer.formats.model_card import ADAPTER_FOLDER, TOKENIZER_FOLDER, ModelCard
from headrace_trainer.formats.preview import preview
from headrace_trainer.formats.records import Record, Shape
from headrace_trainer.formats.tokenizer import load_tokenizer
from headrace_trainer.locks import locked
from headrace_trainer.stage import StageContext, write_atomically

DATA_REPORT, EXAMPLES = "data.json", "examples.md"


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a stage begins with."""

    origin: Origin
    """The model that it trains further."""
    card: ModelCard
    """Of the model that it gives: its vocabulary may have grown by the template's tokens."""
    tokenizer: Path
    dataset: Dataset

    @property
    def digest(self) -> str:
        """Of all that the stage reads from files of the user's."""
        if isinstance(self.origin, Pretrained):
            return canonical_digest([self.dataset.digest, self.origin.digest])
        return self.dataset.digest

    def build(self, gang: Gang, config: StartsFromModel, *, seed: int) -> MegatronModule:
        """The model as it is before training, on this gang."""
        model = build_model(
            self.card.architecture,
            gang=gang,
            vocab_size=self.card.vocab_size,
            sequence_length=config.sequence_length,
            precision=config.precision,
        )
        self.fill(model, seed=seed)
        return model

    def fill(self, model: MegatronModule, *, seed: int, head: Head = Head.LANGUAGE_MODEL) -> None:
        """Load the weights. Rows of tokens that the model did not have keep their start weights, and so does a new head."""
        fill_start_weights(model, self.card.architecture, seed=seed)
        self.origin.load(model, head=head)


def run_finetune(
    ctx: StageContext,
    *,
    allowed: Collection[Shape],
    build: Callable[[StageContext, Gang, Start], Loop],
    measure: Callable[[Loop, Start], dict[str, float]] | None = None,
    room: int = 0,
) -> dict[str, float]:
    """Train a model further. Every rank of the gang calls.

    Args:
        ctx: the stage.
        allowed: the shapes of records that the stage takes.
        build: makes the loop before its first step.
        measure: what is measured of the trained model, before it is written; every rank calls it.
        room: positions of the sequence length that a record must leave free.

    Returns:
        The final losses, how much was read, and what was measured.

    Raises:
        UserError: bad configuration or data.
        StorageError: storage failed, or no committed checkpoint is whole.
        Stopped: asked to stop; a checkpoint is committed.
    """
    config = ctx.config
    assert isinstance(config, Finetune)
    check_precision(config.precision)
    start = prepare(ctx, config, allowed=allowed, room=room)
    axes = layout(config.parallelism, num_ranks=ctx.world)
    local_world = ctx.resolved.stage.compute.ranks
    with join_gang(
        axes, rank=ctx.rank, local_rank=ctx.local_rank, local_world=local_world, seed=ctx.resolved.seed
    ) as gang:
        loop = build(ctx, gang, start)
        loop.resume()
        compared = begin_comparison(ctx, loop, start)
        loop.run()
        measured = measure(loop, start) if measure is not None else {}
        if compared is not None:
            loop.stepper.gather_weights()
            measured |= compared.ask_after(loop.stepper.model, ctx.output, kind=config.KIND)
        return leave_finetuned(ctx, loop, start) | measured


def begin_comparison(ctx: StageContext, loop: Loop, start: Start) -> Comparison | None:
    """The stage's samples with the answers from before it; None where there are none. Every rank calls.

    Raises:
        StorageError: storage does not answer.
    """
    config, gang = ctx.config, loop.gang
    assert isinstance(config, Finetune)
    if not isinstance(config, Sampled):
        return None
    tokenizer = load(start.tokenizer)
    compared = Comparison(config.samples, start.dataset, tokenizer=tokenizer, card=start.card, gang=gang)
    if not compared.questions:
        return None
    key = f"{ctx.resolved.stage.name}/samples/{compared.key(start.origin.digest, start.card.precision)}.json"
    if not compared.recall(ctx.store, key):
        ctx.report(phase="Running", message="answers of the starting model")
        loop.stepper.gather_weights()
        seed = ctx.resolved.seed
        model = loop.stepper.model if loop.step == 0 else start.build(gang, config, seed=seed).eval()
        compared.ask_before(model, ctx.store, key)
    return compared


def prepare(
    ctx: StageContext,
    config: StartsFromModel,
    *,
    allowed: Collection[Shape],
    room: int = 0,
    note: Callable[[Record], bytes] = other_columns,
) -> Start:
    """Read the model's card, complete its tokenizer, and encode the records; the node's ranks share the work.

    Args:
        ctx: the stage.
        config: its typed block.
        allowed: the shapes of records that the stage takes.
        room: positions of the sequence length that a record must leave free, as a prompt for its answer.
        note: what is kept of a record beside its tokens.

    Raises:
        UserError: the model, the records or the template cannot be used.
        StorageError: the model is gone.
    """
    origin, kind = find_origin(ctx), ctx.resolved.stage.kind
    folder, done = ctx.scratch / "data", ctx.scratch / "data.done"
    tokenizer = folder / TOKENIZER_FOLDER
    ctx.report(phase="Starting", message="reading the records")
    with locked(ctx.scratch / "data.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            tokenizer.mkdir(parents=True)
            with_chat_template(origin.tokenizer, tokenizer, template=config.chat_template)
            encoder = Encoder(tokenizer, sequence_length=config.sequence_length - room)
            earlier = ctx.input("records") if "records" in ctx.resolved.inputs else None
            dataset = load_dataset(
                config.data,
                name=f"{kind}.data",
                allowed=allowed,
                encoder=encoder,
                storage=ctx.resolved.storage,
                folder=folder,
                earlier=earlier,
                note=note,
                stop_requested=ctx.stop_requested,
            )
            dataset.save(folder)
            write_atomically(done, json.dumps(encoder.stop_ids()))
    card = origin.card
    vocab_size = max(card.vocab_size, load_tokenizer(tokenizer).vocab_size)
    card = card.model_copy(
        update={
            "vocab_size": vocab_size,
            "padded_vocab_size": padded_vocab(vocab_size),
            "sequence_length": max(card.sequence_length, config.sequence_length),
            "precision": config.precision,
            "stop_ids": tuple(json.loads(done.read_text())),
        }
    )
    return Start(origin=origin, card=card, tokenizer=tokenizer, dataset=Dataset.open(folder))


def num_steps(config: Finetune, samples: Samples) -> int:
    """Optimizer steps of all epochs.

    Raises:
        UserError: the warm-up takes as many.
    """
    steps = math.ceil(config.epochs * samples.num_samples / config.global_batch_size)
    if config.schedule.warmup >= steps:
        raise UserError(
            f"{config.KIND}.schedule.warmup: {config.schedule.warmup}: must be below the {steps} steps that "
            f"{config.epochs:g} epochs of {samples.num_samples:,} samples take; lower it, or raise epochs"
        )
    return steps


def leave_finetuned(ctx: StageContext, loop: Loop, start: Start) -> dict[str, float]:
    """Write the stage's output. Every rank calls.

    Returns:
        The figures that the stage ends with.
    """
    config, model = ctx.config, loop.state.model
    assert isinstance(config, Finetune)
    trained: dict[str, float] = {}
    if config.adapter is not None:
        lora = config.adapter.lora
        write_adapter(
            ctx.output / ADAPTER_FOLDER,
            model,
            lora=lora,
            card=start.card,
            gang=loop.gang,
            with_vocabulary=start.card.vocab_size > start.origin.card.vocab_size,
        )
        merge_adapters(model)
        trained["trainedParameters"] = float(lora.num_parameters(start.card.architecture))
    leave_model(ctx.output, loop, start.card)
    if loop.gang.is_first:
        shutil.copytree(start.tokenizer, ctx.output / TOKENIZER_FOLDER, dirs_exist_ok=True)
        (ctx.output / DATA_REPORT).write_text(json.dumps(start.dataset.report, indent=1))
        (ctx.output / EXAMPLES).write_text(preview(start.dataset.train, load(start.tokenizer)))
    return (
        final_metrics(loop, start.card)
        | trained
        | {
            "recordsIn": float(len(start.dataset.train)),
            "badRecords": float(sum(sum(s["bad"].values()) for s in start.dataset.report["sources"])),
            "truncated": float(sum(s["truncated"] for s in start.dataset.report["sources"])),
        }
    )
