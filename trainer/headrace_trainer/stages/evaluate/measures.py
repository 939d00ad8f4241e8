"""Surprisal, perplexity and bits per byte."""

import math


def surprisal(probability: float) -> float:
    """How unexpected an event of this probability is, in nats; 0 if it was certain.

    A language model's loss is the mean surprisal of the actual tokens.
    """
    return 0.0 - math.log(probability)  # plain negation would print certainty as -0.000


def perplexity(loss: float) -> float:
    """The number of equally likely tokens that a model with this mean loss is effectively choosing from."""
    return math.exp(loss)


def bits_per_byte(loss: float, *, bytes_per_token: float) -> float:
    """The loss, made independent of the tokenizer.

    Args:
        loss: mean over tokens, in nats.
        bytes_per_token: UTF-8 bytes per token, on the same text.
    """
    return loss / math.log(2) / bytes_per_token
