"""Parameters, tokens, FLOPs and memory of a pretrain stage."""

from dataclasses import dataclass

from headrace_api.parallelism import layout
from headrace_api.planning.memory import Batches, fullest_rank
from headrace_api.stages.pretrain import Pretrain


@dataclass(frozen=True, kw_only=True)
class PretrainEstimate:
    """What a pretrain stage needs."""

    parameters: int
    """Number of parameters, with an unpadded vocabulary."""
    steps: int
    tokens_per_step: int
    tokens_per_parameter: float
    """About 20 is compute-optimal (Hoffmann et al., arXiv 2203.15556)."""
    flops: float
    """Floating-point operations of the whole stage: 6 per parameter and token (arXiv 2001.08361, section 2.1)."""
    data_ranks: int
    state_bytes_per_rank: int
    """Weights, gradients and optimizer state of the fullest rank."""
    activation_bytes_per_rank: int
    """What that rank additionally saves for the backward pass."""


def estimate_pretrain(pretrain: Pretrain, *, num_ranks: int, vocab_size: int, on_gpus: bool) -> PretrainEstimate:
    """Estimate a pretrain stage.

    Args:
        pretrain: the stage's typed block.
        num_ranks: ranks in the gang.
        vocab_size: number of tokens, unpadded.
        on_gpus: whether ranks have GPUs, whose fused kernels save less.
    """
    arch = pretrain.model.architecture
    axes = layout(pretrain.parallelism, num_ranks=num_ranks)
    parameters = arch.num_parameters(vocab_size)
    tokens = pretrain.steps * pretrain.tokens_per_step
    batches = Batches(
        sequence_length=pretrain.sequence_length,
        micro_batch_size=pretrain.micro_batch_size,
        num_micro_batches=pretrain.global_batch_size // (pretrain.micro_batch_size * axes.data),
    )
    memory = fullest_rank(
        arch,
        axes,
        vocab_size=vocab_size,
        precision=pretrain.precision,
        batches=batches,
        fused=on_gpus,
        sequence_parallel=pretrain.sequence_length % axes.tensor == 0,
    )
    return PretrainEstimate(
        parameters=parameters,
        steps=pretrain.steps,
        tokens_per_step=pretrain.tokens_per_step,
        tokens_per_parameter=tokens / parameters,
        flops=6.0 * parameters * tokens,
        data_ranks=axes.data,
        state_bytes_per_rank=memory.state,
        activation_bytes_per_rank=memory.activations,
    )
