"""Surprisal, perplexity and bits per byte. Plain numbers."""

import math


def surprisal(probability: float) -> float:
    """How unexpected something of this probability is, in nats: 0 where it was certain.

    The loss of a language model is the mean surprisal of the tokens that came.
    """
    return 0.0 - math.log(probability)  # not a mere minus sign: that would print certainty as -0.000


def perplexity(loss: float) -> float:
    """The number of equally likely tokens between which a model with this mean loss hesitates."""
    return math.exp(loss)


def bits_per_byte(loss: float, *, bytes_per_token: float) -> float:
    """The loss without its dependence on the tokenizer.

    Args:
        loss: mean over tokens, in nats.
        bytes_per_token: UTF-8 bytes of text for each token, on the same text.
    """
    return loss / math.log(2) / bytes_per_token
