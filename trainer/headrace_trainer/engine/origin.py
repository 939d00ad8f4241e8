"""The model that a stage starts from: an earlier stage's artifact, or a Hugging Face folder.

In: a ``StageContext``. Out: an ``Origin``, checked against the stage's layout and its samples before anything else is read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from headrace_api.base import FieldError
from headrace_api.model import Architecture
from headrace_api.parallelism import split_model
from headrace_api.stages import StartsFromModel
from headrace_trainer.engine.checkpoint.state import load_weights
from headrace_trainer.engine.device.megatron import MegatronModule
from headrace_trainer.engine.model.build import Head
from headrace_trainer.engine.model.importing import load_pretrained
from headrace_trainer.engine.model.scalar_head import load_language_model
from headrace_trainer.errors import UserError
from headrace_trainer.formats.huggingface.files import PretrainedFolder, bring_pretrained
from headrace_trainer.formats.model_card import CHECKPOINT_FOLDER, TOKENIZER_FOLDER, ModelCard, describe, read_card
from headrace_trainer.formats.tokenizer import load_tokenizer
from headrace_trainer.locks import locked
from headrace_trainer.stage import StageContext
from headrace_trainer.storage import open_uri


class Origin(Protocol):
    """Where a stage's weights, tokenizer and dimensions come from."""

    @property
    def card(self) -> ModelCard:
        """The model's."""

    @property
    def tokenizer(self) -> Path:
        """A folder with the model's."""

    @property
    def digest(self) -> str:
        """Another model has another one."""

    def load(self, model: MegatronModule, *, head: Head) -> None:
        """Read the weights into a model, all but those of a new head. Every rank calls."""


@dataclass(frozen=True, kw_only=True)
class EarlierStage:
    """An artifact of a stage that trained a model."""

    folder: Path
    card: ModelCard
    digest: str

    @property
    def tokenizer(self) -> Path:
        """See ``Origin``."""
        return self.folder / TOKENIZER_FOLDER

    def load(self, model: MegatronModule, *, head: Head) -> None:
        """See ``Origin``."""
        load = load_weights if head is Head.LANGUAGE_MODEL else load_language_model
        load(model, self.folder / CHECKPOINT_FOLDER)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A Hugging Face folder."""

    source: PretrainedFolder
    card: ModelCard

    @property
    def tokenizer(self) -> Path:
        """See ``Origin``."""
        return self.source.folder

    @property
    def digest(self) -> str:
        """See ``Origin``."""
        return self.source.digest

    def load(self, model: MegatronModule, *, head: Head) -> None:
        """See ``Origin``."""
        load_pretrained(model, self.source)


def find_origin(ctx: StageContext) -> Origin:
    """The model that the stage starts from, on this node.

    Raises:
        UserError: the model cannot be used here, or not in this layout or with samples this long.
        StorageError: the model is gone.
    """
    config = ctx.config
    assert isinstance(config, StartsFromModel)
    if config.base is None:
        folder = ctx.input("model")
        card = read_card(folder)
        check_fit(config, card.architecture)
        return EarlierStage(folder=folder, card=card, digest=ctx.resolved.inputs["model"].digest)
    ctx.report(phase="Starting", message=f"reading {config.base.uri}")
    with locked(ctx.scratch / "base.lock"):
        source = bring_pretrained(
            open_uri(config.base.uri, ctx.resolved.storage),
            ctx.scratch / "base",
            field=f"{config.KIND}.base.uri",
            check=lambda architecture: check_fit(config, architecture),
        )
    return Pretrained(source=source, card=_card(source, config, uri=config.base.uri))


def check_fit(config: StartsFromModel, architecture: Architecture) -> None:
    """Hold a stage against dimensions that only its model knows.

    Raises:
        UserError: the ranks cannot split it, or samples are longer than its window.
    """
    try:
        split_model(config.parallelism, architecture)
    except FieldError as error:
        raise UserError(f"{config.KIND}.{error.field}: {error.value}: {error.remedy}") from error
    if architecture.window is not None and config.sequence_length > architecture.window:
        raise UserError(
            f"{config.KIND}.sequenceLength: {config.sequence_length}: must be at most {architecture.window:,}, the model's "
            "sliding_window, since windows are not done here; lower it, or start from another model"
        )


def _card(source: PretrainedFolder, config: StartsFromModel, *, uri: str) -> ModelCard:
    card = describe(
        source.architecture,
        vocab_size=source.vocab_size,
        eod_id=load_tokenizer(source.folder).eod_id,
        sequence_length=config.sequence_length,
        precision=config.precision,
    )
    return card.model_copy(update={"bos_id": source.bos_id, "context": source.context, "base": uri})
