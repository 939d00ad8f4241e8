"""Logits -> the next token of each sequence.

Everything is a function of the logits, the settings and one uniform draw for each token; draws are a function of the
seed and the sequence's name. Shapes: B sequences, V the real vocabulary.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

_KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and when a sequence ends."""

    max_new_tokens: int
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int | None = None
    """Choose among this many likeliest tokens only."""
    top_p: float = 1.0
    """Choose among the fewest likeliest tokens that have this probability together."""
    stop_tokens: frozenset[int] = frozenset()
    """A sequence ends with any of these, which is its last token."""
    seed: int = 0


def choose(logits_BV: torch.Tensor, sampling: Sampling, draws_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row.

    Args:
        logits_BV: over the real vocabulary.
        sampling: how.
        draws_B: uniform in [0, 1), float64, on the CPU.

    Returns:
        Tokens [B], and their log-probabilities [B] at the temperature, before top-k and top-p, on the CPU.
    """
    # On the CPU: torch has no deterministic cumulative sum on GPUs, and the host must have the tokens anyhow.
    logits_BV = logits_BV.float().cpu()
    is_greedy = sampling.temperature == 0
    log_probs_BV = torch.log_softmax(logits_BV if is_greedy else logits_BV / sampling.temperature, -1)
    tokens_B = (
        log_probs_BV.argmax(-1) if is_greedy else _drawn(_filtered(log_probs_BV.double().exp(), sampling), draws_B)
    )
    return tokens_B, log_probs_BV.gather(-1, tokens_B[:, None])[:, 0]


def _filtered(probs_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities with 0 for all tokens that top-k and top-p leave out; not normalised again."""
    if sampling.top_k is not None and sampling.top_k < probs_BV.size(-1):
        least_B1 = probs_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        probs_BV = probs_BV.masked_fill(probs_BV < least_B1, 0.0)
    if sampling.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        is_out_BV = before_BV >= sampling.top_p * sorted_BV.sum(-1, keepdim=True)
        is_out_BV[:, 0] = False  # one token is left whatever top_p is
        probs_BV = probs_BV.masked_fill(torch.zeros_like(is_out_BV).scatter(-1, order_BV, is_out_BV), 0.0)
    return probs_BV


def _drawn(weights_BV: torch.Tensor, draws_B: torch.Tensor) -> torch.Tensor:
    """The token at which the sum of the weights passes the draw's part of the whole: inverse transform sampling."""
    sums_BV = weights_BV.cumsum(-1)
    total_B1 = sums_BV[:, -1:]
    # A draw next to 1 may be rounded to the whole, behind which there is no token.
    targets_B1 = torch.minimum(draws_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(sums_BV, targets_B1, right=True)[:, 0]


def uniform_draws(sampling: Sampling, name: str) -> np.ndarray:
    """The draws of the sequence of a name, float64 [max_new_tokens].

    They come from a counter-based generator (Philox) whose key is made of the seed and the name, and depend on nothing else.
    """
    digest = hashlib.sha256(f"{sampling.seed} {name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:_KEY_BYTES], "big")))
    return generator.random(sampling.max_new_tokens)
