"""Parameters, tokens, operations and memory of a pretrain stage."""

from dataclasses import dataclass

from headrace_api.model import padded_vocab
from headrace_api.parallelism import layout
from headrace_api.stages.pretrain import Precision, Pretrain

_WEIGHT_BYTES = {Precision.FP32: 4, Precision.BF16: 2, Precision.FP8: 2}
_MAIN_WEIGHT_BYTES = {Precision.FP32: 0, Precision.BF16: 4, Precision.FP8: 4}
_GRADIENT_BYTES = 4
_ADAM_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class PretrainEstimate:
    """What a pretrain stage needs."""

    parameters: int
    """Parameters, with the vocabulary unpadded."""
    steps: int
    tokens_per_step: int
    tokens_per_parameter: float
    """About 20 is compute-optimal by Hoffmann et al., arXiv 2203.15556."""
    flops: float
    """Floating-point operations of the whole stage: 6 a parameter and token (arXiv 2001.08361, section 2.1)."""
    data_ranks: int
    state_bytes_per_rank: int
    """Weights, gradients and optimizer state of the fullest rank; activations come on top."""


def estimate_pretrain(pretrain: Pretrain, *, num_ranks: int, vocab_size: int) -> PretrainEstimate:
    """Plan a pretrain stage.

    Args:
        pretrain: the stage's typed block.
        num_ranks: ranks in the gang.
        vocab_size: tokens in the vocabulary, unpadded.
    """
    arch = pretrain.model.architecture
    ranks = layout(pretrain.parallelism, arch, num_ranks=num_ranks)
    parameters = arch.num_parameters(vocab_size)
    stored = arch.num_parameters(padded_vocab(vocab_size)) / (ranks.tensor * ranks.pipeline)
    replicated = _WEIGHT_BYTES[pretrain.precision] + _GRADIENT_BYTES
    sharded = (_MAIN_WEIGHT_BYTES[pretrain.precision] + _ADAM_BYTES) / ranks.data
    tokens = pretrain.steps * pretrain.tokens_per_step
    return PretrainEstimate(
        parameters=parameters,
        steps=pretrain.steps,
        tokens_per_step=pretrain.tokens_per_step,
        tokens_per_parameter=tokens / parameters,
        flops=6.0 * parameters * tokens,
        data_ranks=ranks.data,
        state_bytes_per_rank=int(stored * (replicated + sharded)),
    )
