"""A trained model's description: ``model.json`` beside its checkpoint. No torch: export and evaluate read it first."""

from pathlib import Path

from headrace_api.base import Spec
from headrace_api.model import Architecture, padded_vocab
from headrace_api.stages.training import Precision

MODEL_FILE = "model.json"
CHECKPOINT_FOLDER = "checkpoint"
ADAPTER_FOLDER = "adapter"
TOKENIZER_FOLDER = "tokenizer"
HISTORY_FILE = "history.jsonl"


class ModelCard(Spec):
    """Everything needed to rebuild a model around its checkpoint."""

    architecture: Architecture
    """architecture holds the model's dimensions."""
    vocab_size: int
    """vocabSize is the number of tokens. The checkpoint's matrices are padded: see paddedVocabSize."""
    padded_vocab_size: int
    """paddedVocabSize is the number of rows of the embedding and output matrices."""
    eod_id: int
    """eodId is the token that ends a document."""
    stop_ids: tuple[int, ...] = ()
    """stopIds are the tokens that end an answer, where the model was trained to give answers."""
    bos_id: int | None = None
    """bosId is the token that begins a document, if a model that was trained elsewhere has one; eodId otherwise."""
    sequence_length: int
    """sequenceLength is the number of tokens per training sample."""
    context: int | None = None
    """context is the number of tokens that the model was made for, where it was trained elsewhere."""
    base: str | None = None
    """base is the address of the model that training started from, where it was trained elsewhere."""

    @property
    def first_id(self) -> int | None:
        """The token that begins a document; None if a model that was trained elsewhere knows none."""
        return self.eod_id if self.base is None else self.bos_id

    precision: Precision
    """precision is the number format used in training."""


def describe(
    architecture: Architecture, *, vocab_size: int, eod_id: int, sequence_length: int, precision: Precision
) -> ModelCard:
    """Build the card of a model with this vocabulary."""
    return ModelCard(
        architecture=architecture,
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab(vocab_size),
        eod_id=eod_id,
        sequence_length=sequence_length,
        precision=precision,
    )


def read_card(folder: Path) -> ModelCard:
    """Read the card from a checkpoint artifact."""
    return ModelCard.model_validate_json((folder / MODEL_FILE).read_text())


def write_card(card: ModelCard, folder: Path) -> None:
    """Write the card into a checkpoint artifact."""
    (folder / MODEL_FILE).write_text(card.model_dump_json(by_alias=True, indent=1))
