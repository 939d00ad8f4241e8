"""What a trained model is: ``model.json`` beside its checkpoint. No torch: export, evaluate and serve read it first."""

from pathlib import Path

from headrace_api.base import Spec
from headrace_api.model import Architecture, padded_vocab
from headrace_api.stages.training import Precision

MODEL_FILE = "model.json"
CHECKPOINT_FOLDER = "checkpoint"
TOKENIZER_FOLDER = "tokenizer"
HISTORY_FILE = "history.jsonl"


class ModelCard(Spec):
    """Everything that is needed to rebuild a model around its checkpoint."""

    architecture: Architecture
    """architecture is every dimension."""
    vocab_size: int
    """vocabSize is the number of tokens; the matrices in the checkpoint are wider, see paddedVocabSize."""
    padded_vocab_size: int
    """paddedVocabSize is the number of rows of the embedding and output matrices."""
    eod_id: int
    """eodId is the token that ends a document."""
    stop_ids: tuple[int, ...] = ()
    """stopIds are the tokens that end an answer, where the model was trained to give answers."""
    sequence_length: int
    """sequenceLength is the number of tokens that the model was trained to see at once."""
    precision: Precision
    """precision is the number format that it was trained in."""


def describe(
    architecture: Architecture, *, vocab_size: int, eod_id: int, sequence_length: int, precision: Precision
) -> ModelCard:
    """The card of a model with this vocabulary."""
    return ModelCard(
        architecture=architecture,
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab(vocab_size),
        eod_id=eod_id,
        sequence_length=sequence_length,
        precision=precision,
    )


def read_card(folder: Path) -> ModelCard:
    """The card in the folder of a checkpoint artifact."""
    return ModelCard.model_validate_json((folder / MODEL_FILE).read_text())


def write_card(card: ModelCard, folder: Path) -> None:
    """Put the card into the folder of a checkpoint artifact."""
    (folder / MODEL_FILE).write_text(card.model_dump_json(by_alias=True, indent=1))
