"""A GPTModel whose padded vocabulary cannot be seen.

The embedding and output matrices are padded to one width for all layouts. Their last columns would take part in the
softmax, and the loss would depend on the padding; here they are hidden from it.
"""

from typing import Any

import torch

from headrace_trainer.engine.device.megatron import GPTModel, parallel_state


class LanguageModel(GPTModel):  # type: ignore[misc]
    """Megatron's GPTModel over ``real_vocab_size`` tokens.

    Args:
        real_vocab_size: tokens that exist; the other columns have probability 0.
        embedding_scale: what embeddings are multiplied by on their way into the first layer.
        kwargs: as for GPTModel; its ``vocab_size`` is the padded width.
    """

    def __init__(self, *, real_vocab_size: int, embedding_scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if embedding_scale != 1 and self.pre_process:
            self.embedding.register_forward_hook(_Scale(embedding_scale))
        self.real_vocab_size = real_vocab_size

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of each label, in nats.

        Args:
            labels: [batch, sequence].
            logits: [sequence, batch, this rank's part of the padded vocabulary]; overwritten.

        Returns:
            [batch, sequence].
        """
        losses: torch.Tensor = super().compute_language_model_loss(labels, hide_padding(logits, self.real_vocab_size))
        return losses


class _Scale:
    """Multiplies what a module gives by a number in that number format."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, module: torch.nn.Module, given: Any, embedded: torch.Tensor) -> torch.Tensor:
        return embedded * torch.tensor(self._scale, dtype=module.word_embeddings.weight.dtype, device=embedded.device)


def hide_padding(logits: torch.Tensor, real_vocab_size: int) -> torch.Tensor:
    """Logits whose padded columns have probability 0.

    Args:
        logits: [..., this rank's part of the padded vocabulary]; overwritten.
        real_vocab_size: tokens that exist.
    """
    width = logits.size(-1)
    first_padded = real_vocab_size - parallel_state.get_tensor_model_parallel_rank() * width
    if first_padded < width:
        logits[..., max(0, first_padded) :] = float("-inf")
    return logits
