"""Rewards of an iteration's answers -> what each token was worth. Pure: the same numbers on every rank.

Shapes: N answers, prompt by prompt; P prompts, G answers to each, N = P G; M the longest answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import torch

from headrace_trainer.engine.losses import (
    KlEstimator,
    generalized_advantages,
    group_advantages,
    kl_estimates,
    leave_one_out_advantages,
    whiten,
)


class Credit(Enum):
    """What an answer is held against."""

    GROUP = auto()
    """The mean of its group, over its standard deviation."""
    GROUP_UNSCALED = auto()
    """The mean of its group."""
    OTHERS = auto()
    """The mean of the others of its group, the divergence counted as a part of the reward."""
    VALUE = auto()
    """A value, token by token, the divergence counted as a part of the reward."""


@dataclass(frozen=True, kw_only=True)
class Worth:
    """How an answer's reward is spread over its tokens."""

    credit: Credit
    group_size: int
    estimator: KlEstimator
    gamma: float = 1.0
    lam: float = 0.95
    missing_eos_penalty: float = 0.0
    whiten_rewards: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """An answer with its reward; arrays are float32, a number for each of its tokens."""

    reward: float
    stopped: bool
    log_probs: np.ndarray
    reference: np.ndarray | None
    values: np.ndarray | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Credited:
    """What an answer's tokens were worth, float32 [tokens]."""

    advantages: np.ndarray
    returns: np.ndarray | None = None


def neutral_for_failed(scores_N: np.ndarray, *, group_size: int) -> np.ndarray:
    """Scores whose failed ones (NaN or infinite) are the mean of the others of their group, and so teach nothing."""
    scores_PG = scores_N.reshape(-1, group_size).astype(np.float64)
    good_PG = np.isfinite(scores_PG)
    counts_P1 = good_PG.sum(1, keepdims=True)
    means_P1 = np.where(good_PG, scores_PG, 0.0).sum(1, keepdims=True) / np.maximum(counts_P1, 1)
    found: np.ndarray = np.where(good_PG, scores_PG, means_P1).reshape(-1)
    return found


def credit(answers: Sequence[Judged], worth: Worth, *, kl_coefficient: float) -> list[Credited]:
    """What each token was worth.

    Args:
        answers: of one iteration, all of them, prompt by prompt.
        worth: how rewards are spread.
        kl_coefficient: weight of the divergence in the rewards of ``OTHERS`` and ``VALUE``.
    """
    if worth.credit is Credit.VALUE:
        return _by_value(answers, worth, kl_coefficient=kl_coefficient)
    rewards = [a.reward for a in answers]
    if worth.credit is Credit.OTHERS and kl_coefficient:
        rewards = [
            r - kl_coefficient * float(_kl(a, worth.estimator).sum()) for r, a in zip(rewards, answers, strict=True)
        ]
    rewards_PG = torch.tensor(rewards, dtype=torch.float64).reshape(-1, worth.group_size)
    if worth.credit is Credit.OTHERS:
        found = leave_one_out_advantages(rewards_PG)
    else:
        found = group_advantages(rewards_PG, scale_by_std=worth.credit is Credit.GROUP)
    return [
        Credited(advantages=np.full(len(a.log_probs), value, np.float32))
        for a, value in zip(answers, found.flatten().tolist(), strict=True)
    ]


def _by_value(answers: Sequence[Judged], worth: Worth, *, kl_coefficient: float) -> list[Credited]:
    lengths = [len(a.log_probs) for a in answers]
    shape = len(answers), max(lengths)
    rewards_NM, values_NM, mask_NM = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for i, (a, length) in enumerate(zip(answers, lengths, strict=True)):
        assert a.values is not None
        mask_NM[i, :length] = 1
        values_NM[i, :length] = torch.from_numpy(a.values)
        if kl_coefficient:
            rewards_NM[i, :length] -= kl_coefficient * torch.from_numpy(_kl(a, worth.estimator))
        rewards_NM[i, length - 1] += a.reward - (0.0 if a.stopped else worth.missing_eos_penalty)
    if worth.whiten_rewards:
        rewards_NM = whiten(rewards_NM, mask_NM, shift_mean=False)
    advantages_NM, returns_NM = generalized_advantages(rewards_NM, values_NM, mask_NM, gamma=worth.gamma, lam=worth.lam)
    advantages_NM = whiten(advantages_NM, mask_NM)
    return [
        Credited(advantages=one[:n].float().numpy(), returns=other[:n].float().numpy())
        for one, other, n in zip(advantages_NM, returns_NM, lengths, strict=True)
    ]


def _kl(answer: Judged, estimator: KlEstimator) -> np.ndarray:
    """The divergence from the reference at each token."""
    assert answer.reference is not None, "a divergence has a weight only where there is a reference"
    one, other = torch.from_numpy(answer.log_probs), torch.from_numpy(answer.reference)
    found: np.ndarray = kl_estimates(one, other, kind=estimator).numpy()
    return found


def adapted(coefficient: float, *, kl: float, target: float, answers: int, horizon: int) -> float:
    """The coefficient that comes next (arXiv 1909.08593, section 2.2).

    Args:
        coefficient: the present one.
        kl: divergence of an answer, as measured.
        target: what it should be.
        answers: that were drawn since the coefficient changed.
        horizon: answers over which an error of 100% would change it by as much.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * answers / horizon)
