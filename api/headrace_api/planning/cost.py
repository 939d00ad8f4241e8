"""Parameters, tokens, FLOPs and memory of a training stage."""

from dataclasses import dataclass

from headrace_api.model import Architecture
from headrace_api.parallelism import layout
from headrace_api.planning.memory import Batches, fullest_rank
from headrace_api.stages.finetune import Finetune, Lora
from headrace_api.stages.pretrain import Pretrain
from headrace_api.stages.training import Training


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training stage needs."""

    parameters: int
    """Number of parameters, with an unpadded vocabulary; includes those of an adapter."""
    trained_parameters: int
    """Number of trained parameters: all, or those of the adapter."""
    steps: int | None
    """None if it depends on the stage's records, which have not been read yet."""
    tokens_per_step: int
    """Including padding."""
    flops_per_step: float
    """Floating-point operations per step: 2 per parameter and token forward, 2 backward, and 2 more for the gradient of each
    trained parameter (arXiv 2001.08361, section 2.1)."""
    data_ranks: int
    state_bytes_per_rank: int
    """Weights, gradients and optimizer state of the fullest rank."""
    activation_bytes_per_rank: int
    """What that rank additionally saves for the backward pass."""

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole stage."""
        return None if self.steps is None else self.steps * self.tokens_per_step

    @property
    def tokens_per_parameter(self) -> float | None:
        """About 20 is compute-optimal for pretraining (Hoffmann et al., arXiv 2203.15556)."""
        return None if self.tokens is None else self.tokens / self.parameters

    @property
    def flops(self) -> float | None:
        """Floating-point operations of the whole stage."""
        return None if self.steps is None else self.steps * self.flops_per_step


def adapter_of(training: Training) -> Lora | None:
    """The adapter that a stage trains instead of its model; None if it trains the model itself."""
    adapter = training.adapter if isinstance(training, Finetune) else None
    return adapter.lora if adapter is not None else None


def estimate_training(
    training: Training, arch: Architecture, *, num_ranks: int, vocab_size: int, on_gpus: bool
) -> Estimate:
    """Estimate a training stage.

    Args:
        training: the stage's typed block.
        arch: its model's dimensions.
        num_ranks: ranks in the gang.
        vocab_size: number of tokens, unpadded.
        on_gpus: whether ranks have GPUs, whose fused kernels save less.
    """
    axes = layout(training.parallelism, num_ranks=num_ranks)
    lora, model = adapter_of(training), arch.num_parameters(vocab_size)
    added = 0 if lora is None else lora.num_parameters(arch)
    trained = model if lora is None else added
    batches = Batches(
        sequence_length=training.sequence_length,
        micro_batch_size=training.micro_batch_size,
        num_micro_batches=training.global_batch_size // (training.micro_batch_size * axes.data),
    )
    memory = fullest_rank(
        arch,
        axes,
        vocab_size=vocab_size,
        precision=training.precision,
        batches=batches,
        fused=on_gpus,
        sequence_parallel=training.sequence_length % axes.tensor == 0,
        lora=lora,
    )
    return Estimate(
        parameters=model + added,
        trained_parameters=trained,
        steps=training.steps if isinstance(training, Pretrain) else None,
        tokens_per_step=training.tokens_per_step,
        flops_per_step=(4.0 * (model + added) + 2.0 * trained) * training.tokens_per_step,
        data_ranks=axes.data,
        state_bytes_per_rank=memory.state,
        activation_bytes_per_rank=memory.activations,
    )
