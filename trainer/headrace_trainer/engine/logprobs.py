"""Log-probabilities of a pack's labels, and entropies, from logits whose vocabulary is split over tensor ranks.

In: a model and a pack. Out: one number for each token, the same on all tensor ranks, differentiable; no rank ever holds
a token's logits whole. The padding of the vocabulary has probability 0.

Shapes: 1 the micro-batch, T row of a pack, V this tensor rank's part of the padded vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from headrace_trainer.engine.device.megatron import get_attr_wrapped_model, parallel_state, tensor_parallel
from headrace_trainer.engine.forward import forward_passes
from headrace_trainer.engine.model.language_model import hide_padding
from headrace_trainer.engine.packed import PackedBatch


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What the model says of a pack's labels. Where there is no label, that of token 0."""

    log_probs_1T: torch.Tensor
    """In nats."""
    entropy_1T: torch.Tensor | None
    """Of the whole distribution, in nats; none if it was not asked for."""


def score(
    model: torch.nn.Module, batch: PackedBatch, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[torch.Tensor, Callable[[torch.Tensor], TokenScores]]:
    """Run this stage of the model; on the last stage its output goes through the function that comes second.

    Args:
        model: with a language model's head, wrapped or not.
        batch: one pack.
        temperature: logits are divided by it, as they were for sampling.
        entropy: whether entropies are wanted too, which takes the memory of the logits three times more.
    """
    vocab_size: int = get_attr_wrapped_model(model, "real_vocab_size")

    def scores(logits_1TV: torch.Tensor) -> TokenScores:
        logits_1TV = hide_padding(logits_1TV, vocab_size)
        if temperature != 1:
            logits_1TV = logits_1TV / temperature
        found = vocab_parallel_entropy(logits_1TV) if entropy else None
        # Last, because it overwrites the logits.
        losses_1T = tensor_parallel.vocab_parallel_cross_entropy(logits_1TV, batch.labels_1T)
        return TokenScores(log_probs_1T=-losses_1T, entropy_1T=found)

    return batch.run(model), scores


def log_probs(model: torch.nn.Module, batches: Sequence[PackedBatch], *, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of the labels of packs, without gradients. Every rank of the replica calls.

    Returns:
        [packs, T], the same on every rank of the replica.
    """

    def forward(
        model: torch.nn.Module, batch: PackedBatch
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        output, scores = score(model, batch, temperature=temperature)
        return output, lambda output: scores(output).log_probs_1T[0]

    return forward_passes(model, batches, forward, shape=(batches[0].tokens_1T.size(1),))


def vocab_parallel_entropy(logits_1TV: torch.Tensor) -> torch.Tensor:
    """-sum p log p over all tensor ranks, [1, T]; a logit of -inf is a token that cannot come."""
    logits_1TV = logits_1TV.float()
    highest_1T = logits_1TV.detach().amax(-1)
    dist.all_reduce(highest_1T, dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    shifted_1TV = logits_1TV - highest_1T[..., None]
    weights_1TV = shifted_1TV.exp()
    # 0 log 0 is 0, and its gradient too.
    weighted_1TV = weights_1TV * shifted_1TV.masked_fill(shifted_1TV == -torch.inf, 0.0)
    sums_21T = torch.stack((weights_1TV.sum(-1), weighted_1TV.sum(-1)))
    total_1T, weighted_1T = tensor_parallel.reduce_from_tensor_model_parallel_region(sums_21T.contiguous())
    return total_1T.log() - weighted_1T / total_1T
