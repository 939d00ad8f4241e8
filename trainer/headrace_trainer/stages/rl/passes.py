"""Answers through a model without gradients: some numbers for each of their tokens.

Shapes: K numbers, T tokens of a row, M tokens of an answer.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from headrace_trainer import board
from headrace_trainer.engine.forward import Forward, forward_passes
from headrace_trainer.engine.logprobs import score
from headrace_trainer.engine.packed import PackedBatch, collate
from headrace_trainer.engine.policy import with_values
from headrace_trainer.formats.packs import Pack, best_fit
from headrace_trainer.stages.rl.answers import Answer

_ROWS_AT_ONCE = 16


def over_answers(
    model: torch.nn.Module,
    answers: Sequence[Answer],
    forward: Forward,
    *,
    width: int,
    length: int,
    device: torch.device,
) -> list[np.ndarray]:
    """What a function makes of the model's outputs where each token of an answer is predicted.

    Args:
        model: this rank's part; every rank of the replica calls, with the same answers.
        answers: any number.
        forward: what is run, and what is made of its output: [K, T].
        width: K.
        length: tokens of a row.
        device: where to.

    Returns:
        float32 [K, M] for each answer.
    """
    documents = [a.document for a in answers]
    if not documents:
        return []
    bins = best_fit(np.array([len(d) for d in documents]), capacity=length)
    found: list[np.ndarray] = [np.empty(0)] * len(documents)
    for first in range(0, len(bins), _ROWS_AT_ONCE):
        numbers = [bins[i] for i in range(first, min(len(bins), first + _ROWS_AT_ONCE))]
        rows = [
            collate(Pack(documents=tuple(documents[n] for n in row)), length=length, device=device) for row in numbers
        ]
        made = forward_passes(model, rows, forward, shape=(width, length)).cpu().numpy()
        for of_row, row, values_KT in zip(numbers, rows, made, strict=True):
            kept_KT = values_KT[:, row.mask_1T[0].cpu().numpy() > 0]
            cuts = np.cumsum([len(answers[n].tokens) for n in of_row])[:-1]
            for n, part in zip(of_row, np.split(kept_KT, cuts, axis=1), strict=True):
                found[n] = np.ascontiguousarray(part)
        board.beat()
    return found


def token_log_probs(temperature: float) -> Forward:
    """Log-probabilities of the labels at a temperature, [1, T]."""

    def forward(
        model: torch.nn.Module, row: PackedBatch
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        output, scores = score(model, row, temperature=temperature)
        return output, lambda output: scores(output).log_probs_1T.float()

    return forward


def token_log_probs_and_values(temperature: float) -> Forward:
    """Log-probabilities of the labels at a temperature, and values, [2, T]."""

    def forward(
        model: torch.nn.Module, row: PackedBatch
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        output, scores = score(model, row, temperature=temperature)

        def both(output_1TV: torch.Tensor) -> torch.Tensor:
            logits_1TV, values_1T = with_values(output_1TV)
            return torch.cat((scores(logits_1TV).log_probs_1T.float(), values_1T))

        return output, both

    return forward
