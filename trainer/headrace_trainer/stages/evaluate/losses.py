"""The model's loss on every token of the validation split.

Windows do not overlap, so each token is predicted once, from the tokens before it in its window. Shapes: B = windows
per batch, T = sequence length, N = windows.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from headrace_api.base import FieldError
from headrace_api.parallelism import Layout, Parallelism, layout, split_model
from headrace_trainer.engine.objective import NextToken
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.errors import UserError
from headrace_trainer.formats.model_card import ModelCard
from headrace_trainer.formats.shards.reader import TokenDataset

_BATCH = 8


def evaluation_layout(card: ModelCard, *, num_ranks: int) -> Layout:
    """One replica and one pipeline stage: all ranks share each matrix.

    Raises:
        UserError: the model cannot be split this way.
    """
    try:
        split_model(Parallelism(tensor=num_ranks), card.architecture)
        return layout(Parallelism(tensor=num_ranks), num_ranks=num_ranks)
    except (FieldError, ValueError) as error:
        raise UserError(
            f"compute.ranksPerNode: {num_ranks}: an evaluate stage splits the model over its ranks: {error}"
        ) from error


def token_losses(
    model: torch.nn.Module, samples: TokenDataset, *, gang: Gang, num_windows: int, tell: Callable[[int], None]
) -> NDArray[np.float32]:
    """Negative log-likelihood of each token, in nats.

    Args:
        model: from ``engine.model.loading``.
        samples: the validation split.
        gang: this rank's place.
        num_windows: N, the number of windows to read.
        tell: called with the number of windows done.

    Returns:
        ``[N, T]``, equal on every rank.
    """
    objective, parts = NextToken(), []
    with torch.no_grad():
        for first in range(0, num_windows, _BATCH):
            indices = range(first, min(first + _BATCH, num_windows))
            batch = objective.collate([samples.sample(i) for i in indices], [1.0] * len(indices), gang.device)
            losses_BT, _ = objective.forward(model, batch)
            parts.append(losses_BT.float().cpu().numpy())
            tell(indices.stop)
    return np.concatenate(parts)
