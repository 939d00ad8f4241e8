"""A trained model on this gang, whatever layout it was trained in."""

from pathlib import Path

import torch

from headrace_trainer.engine.checkpoint.state import load_weights
from headrace_trainer.engine.model.build import build_model
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.formats.model_card import CHECKPOINT_FOLDER, ModelCard


def load_model(card: ModelCard, folder: Path, gang: Gang) -> torch.nn.Module:
    """The model of a checkpoint artifact, to be evaluated. Every rank calls.

    Args:
        card: the artifact's.
        folder: of the artifact.
        gang: this rank's place; process groups must exist.
    """
    model = build_model(
        card.architecture,
        gang=gang,
        vocab_size=card.vocab_size,
        sequence_length=card.sequence_length,
        precision=card.precision,
    )
    load_weights(model, folder / CHECKPOINT_FOLDER)
    module: torch.nn.Module = model
    return module.eval()
