"""Rotary frequencies for contexts longer than those that a model was first trained on."""

import math

import torch

from headrace_api.model import RopeKind, RopeScaling


def scaled_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Frequencies of rotary embeddings, lowered.

    Args:
        frequencies: [head width / 2], in radians a token.
        scaling: how.

    Returns:
        As many: all divided by the factor, or, as Llama 3.1 does it, those whose waves are longer than
        ``original_context / low_frequency_factor``, and in part those whose waves are shorter than that.
    """
    lowered = frequencies / scaling.factor
    if scaling.kind is RopeKind.LINEAR:
        return lowered
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    waves_in_context = scaling.original_context * frequencies / (2 * math.pi)
    kept = ((waves_in_context - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * lowered + kept * frequencies
