"""Losses, advantages and KL estimates of post-training: plain tensors in, plain tensors out, no model and no gang.

Losses come one for each token, sequence or pair, or as sums; never as means: the loop divides by the gang's count, and
so a loss does not depend on how a global batch was cut. What a mask hides reaches neither a sum nor a gradient, not
even where it is NaN.

Shapes: B rows, T tokens of a row, V vocabulary, N pairs or sequences, P prompts, G completions of a prompt; functions
of ``values`` without a suffix take any shape. Log-probabilities are in nats.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch.nn import functional


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of ``values`` weighted by ``mask``; what has weight 0 may be anything.

    Args:
        values: any shape.
        mask: weights of the same shape; 0 hides.
    """
    return (_hidden(values, mask) * mask).sum()


def _hidden(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """0 where the mask is 0, before anything is computed: the gradient of 0 x NaN would be NaN again."""
    return values.masked_fill(mask == 0, 0.0)


# Likelihood ------------------------------------------------------------------------------------------------------


def token_log_probs(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """log p(label), [B, T], from logits that one rank has whole; ``engine.logprobs`` does it where they are split."""
    return torch.log_softmax(logits_BTV.float(), -1).gather(-1, labels_BT[..., None]).squeeze(-1)


def token_entropy(logits_BTV: torch.Tensor) -> torch.Tensor:
    """-sum_v p log p, [B, T], in nats; a logit of -inf is a token that cannot come."""
    log_probs = torch.log_softmax(logits_BTV.float(), -1)
    # 0 log 0 is 0, and its gradient too.
    finite = log_probs.masked_fill(log_probs == -torch.inf, 0.0)
    return -(log_probs.exp() * finite).sum(-1)


def supervised(log_probs_BT: torch.Tensor, mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of what is trained on.

    Args:
        log_probs_BT: of the labels.
        mask_BT: 1 where a label is trained on, else 0.

    Returns:
        Its sum in nats, and how many labels it is over.
    """
    return -masked_sum(log_probs_BT, mask_BT), mask_BT.sum()


# Rewards ---------------------------------------------------------------------------------------------------------


def bradley_terry(
    chosen_N: torch.Tensor, rejected_N: torch.Tensor, *, margin: torch.Tensor | float = 0.0, centering: float = 0.0
) -> torch.Tensor:
    """-log sigma(chosen - rejected - margin), for each pair (arXiv 2203.02155, eq. 1; margin: 2307.09288, eq. 2).

    Args:
        chosen_N: rewards of the better sides.
        rejected_N: rewards of the worse sides.
        margin: by how much the better side must win, [N] or one number.
        centering: weight of (chosen + rejected)^2, which keeps rewards around 0 (arXiv 2312.09244, eq. 2).

    Returns:
        [N].
    """
    return -functional.logsigmoid(chosen_N - rejected_N - margin) + centering * (chosen_N + rejected_N).square()


# Preferences -----------------------------------------------------------------------------------------------------


class Preference(StrEnum):
    """How a pair's preference becomes a loss, where there is a reference model."""

    SIGMOID = "sigmoid"
    """-log sigma(beta delta): arXiv 2305.18290, eq. 7. On log-ratios per token, its length-normalised form
    (arXiv 2411.15124, sec. 5.1)."""
    IPO = "ipo"
    """(delta - 1 / (2 beta))^2: arXiv 2310.12036, eq. 17."""
    CDPO = "cdpo"
    """Labels are wrong with the probability ``label_smoothing``: the same with soft labels."""
    ROBUST = "robust"
    """The same assumption, unbiased: arXiv 2403.00409."""
    HINGE = "hinge"
    """max(0, 1 - beta delta): arXiv 2305.10425."""


def preference(delta_N: torch.Tensor, *, kind: Preference, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Loss of each pair.

    Args:
        delta_N: log pi/ref of the chosen side less that of the rejected one; log-probabilities summed over a
            completion, or divided by its length for the length-normalised form.
        kind: the loss.
        beta: how strongly the policy is held to the reference.
        label_smoothing: the probability that a label is wrong, in [0, 0.5); cdpo and robust use it.

    Returns:
        [N]; ln 2 where policy and reference are the same, but for ipo (1 / (4 beta^2)) and hinge (1).
    """
    right, wrong = -functional.logsigmoid(beta * delta_N), -functional.logsigmoid(-beta * delta_N)
    match kind:
        case Preference.SIGMOID:
            return right
        case Preference.IPO:
            return (delta_N - 1 / (2 * beta)).square()
        case Preference.CDPO:
            return (1 - label_smoothing) * right + label_smoothing * wrong
        case Preference.ROBUST:
            return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
        case Preference.HINGE:
            return functional.relu(1 - beta * delta_N)


def simpo(chosen_N: torch.Tensor, rejected_N: torch.Tensor, *, beta: float, gamma: float) -> torch.Tensor:
    """-log sigma(beta (chosen - rejected) - gamma), [N] (arXiv 2405.14734, eq. 6).

    Args:
        chosen_N: mean log-probability of a token of the chosen completion.
        rejected_N: that of the rejected one.
        beta: scale.
        gamma: the margin by which the chosen one must win.
    """
    return -functional.logsigmoid(beta * (chosen_N - rejected_N) - gamma)


def odds_ratio(chosen_N: torch.Tensor, rejected_N: torch.Tensor) -> torch.Tensor:
    """-log sigma(log odds(chosen) - log odds(rejected)), [N]: what ORPO adds to the likelihood (arXiv 2403.07691, eq. 7).

    Args:
        chosen_N: mean log-probability of a token of the chosen completion, below 0.
        rejected_N: that of the rejected one.
    """
    return -functional.logsigmoid(log_odds(chosen_N) - log_odds(rejected_N))


def log_odds(log_probs_N: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) from log p, [N]."""
    # Rounded to a probability of 1, the odds would be infinite.
    below_one = log_probs_N.clamp(max=-torch.finfo(log_probs_N.dtype).eps)
    return below_one - torch.log(-torch.expm1(below_one))


def kto(
    log_ratios_N: torch.Tensor,
    desirable_N: torch.Tensor,
    *,
    kl: torch.Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """weight x (1 - sigma(+-beta (log ratio - kl))), [N] (arXiv 2402.01306, eq. 8).

    Args:
        log_ratios_N: log pi/ref of each completion, summed over its tokens.
        desirable_N: whether it is a good one, bool.
        kl: the reference point: KL of policy and reference over the gang's batch, from completions that were shuffled
            against their prompts; at least 0 is taken, and no gradient goes through it.
        beta: how strongly the policy is held to the reference.
        desirable_weight: of good completions.
        undesirable_weight: of bad ones.
    """
    reference_point = torch.as_tensor(kl).detach().clamp(min=0)
    sign_N = torch.where(desirable_N, 1.0, -1.0)
    weight_N = torch.where(desirable_N, desirable_weight, undesirable_weight)
    return weight_N * (1 - torch.sigmoid(sign_N * beta * (log_ratios_N - reference_point)))


# Policy gradients ------------------------------------------------------------------------------------------------


_LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """The clipped objective of a policy, elementwise."""

    losses: torch.Tensor
    """0 where masked."""
    ratios: torch.Tensor
    """pi / pi_old, without a gradient; 1 where masked."""
    clipped: torch.Tensor
    """Whether the clip holds the loss, as 0 or 1."""


def clipped_surrogate(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    *,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Surrogate:
    """-min(r A, clip(r, 1 - low, 1 + high) A) (arXiv 1707.06347, eq. 7; two clips: 2503.14476, eq. 10).

    Tokens give PPO, GRPO and DAPO; sequences, with mean log-probabilities of their tokens, give GSPO (arXiv 2507.18071,
    eq. 5 and 7).

    Args:
        log_probs: of the policy, any shape.
        old_log_probs: of the policy that drew the samples.
        advantages: how much better a sample is than expected.
        mask: 1 where a sample counts, else 0.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.
        dual_clip: where the advantage is negative, the loss is at most this times it (arXiv 1912.09729).
    """
    log_ratios = _hidden(log_probs, mask) - _hidden(old_log_probs, mask)
    # An infinite ratio times an advantage of 0 would be NaN.
    ratios = torch.exp(log_ratios.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))
    advantages = _hidden(advantages, mask)
    free, held = -ratios * advantages, -ratios.clamp(1 - clip_low, 1 + clip_high) * advantages
    losses = torch.maximum(free, held)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    clipped = (held > free).to(losses.dtype)
    return Surrogate(losses=_hidden(losses, mask), ratios=ratios.detach(), clipped=clipped)


def value_losses(
    values: torch.Tensor, old_values: torch.Tensor, *, returns: torch.Tensor, mask: torch.Tensor, clip: float
) -> torch.Tensor:
    """0.5 max((v - R)^2, (clip(v, old +- clip) - R)^2), elementwise, 0 where masked (arXiv 2005.12729)."""
    values, old_values, returns = (_hidden(x, mask) for x in (values, old_values, returns))
    held = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    return 0.5 * torch.maximum((values - returns).square(), (held - returns).square())


class KlEstimator(StrEnum):
    """Estimates of KL(policy, reference) from samples of the policy (Schulman, "Approximating KL divergence")."""

    K1 = "k1"
    """Unbiased; negative for some samples."""
    K2 = "k2"
    """Biased, never negative; its gradient is that of the KL."""
    K3 = "k3"
    """Unbiased and never negative (arXiv 2402.03300, eq. 4)."""


def kl_estimates(log_probs: torch.Tensor, reference: torch.Tensor, *, kind: KlEstimator) -> torch.Tensor:
    """One estimate for each sample, any shape, in nats."""
    log_ratios = log_probs - reference
    match kind:
        case KlEstimator.K1:
            return log_ratios
        case KlEstimator.K2:
            return 0.5 * log_ratios.square()
        case KlEstimator.K3:
            return torch.exp(-log_ratios) + log_ratios - 1


# Advantages ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generalized_advantages(
    rewards_BT: torch.Tensor, values_BT: torch.Tensor, mask_BT: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE (arXiv 1506.02438, eq. 16) over the tokens that count, as though the others were not there.

    Args:
        rewards_BT: reward after each token.
        values_BT: value before it.
        mask_BT: 1 where a token is the policy's own, else 0.
        gamma: discount of a token.
        lam: decay of the estimator.

    Returns:
        Advantages and returns, [B, T] each, 0 where masked.
    """
    rewards, values, keeps = _hidden(rewards_BT, mask_BT), _hidden(values_BT, mask_BT), mask_BT != 0
    advantages_BT = torch.zeros_like(values)
    next_value, advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        error = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(keeps[:, t], error + gamma * lam * advantage, advantage)
        next_value = torch.where(keeps[:, t], values[:, t], next_value)
        advantages_BT[:, t] = torch.where(keeps[:, t], advantage, 0.0)
    return advantages_BT, advantages_BT + values


def moments(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Count, sum and sum of squares of what counts, float64 [3]: those of a gang's ranks add up."""
    kept = _hidden(values, mask).double()
    return torch.stack((mask.double().sum(), (kept * mask).sum(), (kept.square() * mask).sum()))


def whiten(
    values: torch.Tensor, mask: torch.Tensor, *, over: torch.Tensor | None = None, shift_mean: bool = True
) -> torch.Tensor:
    """Scale what counts to variance 1, and shift it to mean 0; 0 where masked.

    Args:
        values: any shape.
        mask: 1 where a value counts, else 0.
        over: ``moments`` of all values that are scaled together; those of ``values`` if None.
        shift_mean: False keeps the mean, as rewards need it.
    """
    kept = _hidden(values, mask).double()
    count, total, squares = moments(kept, mask) if over is None else over
    mean = total / count
    variance = (squares - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
    whitened = (kept - mean) * torch.rsqrt(variance + 1e-8) + (0.0 if shift_mean else mean)
    return _hidden(whitened.to(values.dtype), mask)


def group_advantages(rewards_PG: torch.Tensor, *, scale_by_std: bool = True) -> torch.Tensor:
    """Rewards against the mean of their group, [P, G] (arXiv 2402.03300, sec. 4.1.2); 0 in a group of equal rewards.

    Args:
        rewards_PG: of the completions of each prompt.
        scale_by_std: divide by the group's standard deviation; Dr. GRPO does not (arXiv 2503.20783).

    Raises:
        ValueError: groups of one.
    """
    _refuse_groups_of_one(rewards_PG)
    centred = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return centred / (rewards_PG.std(1, keepdim=True) + 1e-4) if scale_by_std else centred


def leave_one_out_advantages(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Rewards against the mean of the others of their group, [P, G] (RLOO: arXiv 2402.14740).

    Raises:
        ValueError: groups of one.
    """
    _refuse_groups_of_one(rewards_PG)
    size = rewards_PG.size(1)
    others = (rewards_PG.sum(1, keepdim=True) - rewards_PG) / (size - 1)
    return rewards_PG - others


def _refuse_groups_of_one(rewards_PG: torch.Tensor) -> None:
    if rewards_PG.size(1) < 2:
        raise ValueError("groupSize: 1: an advantage is against the others of a group: use 2 or more")


class Aggregation(StrEnum):
    """How token losses are weighted against each other."""

    SEQUENCE = "sequence"
    """Every sequence weighs the same: GRPO (arXiv 2402.03300, eq. 3). Tokens of long sequences weigh less."""
    TOKEN = "token"
    """Every token weighs the same: DAPO (arXiv 2503.14476, eq. 12)."""
    CONSTANT = "constant"
    """Every token weighs 1 / longest completion allowed: Dr. GRPO (arXiv 2503.20783)."""


def token_weights(
    mask_T: torch.Tensor, sequences_T: torch.Tensor, *, num_sequences: int, kind: Aggregation, longest: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of a pack's tokens in the sum of losses, and what the gang's sum is divided by.

    Args:
        mask_T: 1 where a token counts, else 0.
        sequences_T: number of the sequence that each token belongs to, from 0.
        num_sequences: numbers that there are.
        kind: the weighting.
        longest: tokens that a completion may have; ``CONSTANT`` divides by it.

    Returns:
        Weights [T], and this pack's part of the divisor: tokens or sequences that count.
    """
    if kind is Aggregation.TOKEN:
        return mask_T, mask_T.sum()
    lengths_N = mask_T.new_zeros(num_sequences).index_add(0, sequences_T, mask_T)
    if kind is Aggregation.CONSTANT:
        return mask_T / longest, (lengths_N > 0).sum()
    return mask_T / lengths_N.clamp(min=1)[sequences_T], (lengths_N > 0).sum()
