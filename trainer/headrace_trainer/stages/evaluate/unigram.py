"""The baseline: a model that knows only how often each token occurs, nothing of its context."""

import numpy as np
from numpy.typing import NDArray


def unigram_losses(counts_V: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log-likelihood of each token, in nats, under its frequency in the training split.

    Laplace smoothing: every count is incremented by one, so that unseen tokens have some probability.

    Args:
        counts_V: occurrences of each id in the training split.
        tokens: ids, of any shape.
    """
    smoothed_V = counts_V.astype(np.float64) + 1.0
    losses_V = np.log(smoothed_V.sum()) - np.log(smoothed_V)
    found: NDArray[np.float64] = losses_V[tokens]
    return found
