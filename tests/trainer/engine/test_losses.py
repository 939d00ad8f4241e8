"""Losses by their published constants, by finite differences, and with NaN behind every mask."""

import math
from collections.abc import Callable

import pytest
import torch

from headrace_trainer.engine.losses import (
    Aggregation,
    KlEstimator,
    Preference,
    bradley_terry,
    clipped_surrogate,
    generalized_advantages,
    group_advantages,
    kl_estimates,
    kto,
    leave_one_out_advantages,
    masked_sum,
    moments,
    odds_ratio,
    preference,
    simpo,
    supervised,
    token_entropy,
    token_log_probs,
    token_weights,
    value_losses,
    whiten,
)

NAN = math.nan
LN2 = math.log(2)


def tensor(*values: float | list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def near(expected: object, *, within: float = 1e-6) -> object:
    return pytest.approx(expected, abs=within)


# Constants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "label_smoothing", "policy", "expected"),
    [
        (Preference.SIGMOID, 0.0, (-10.0, -12.0), 0.598139),
        (Preference.SIGMOID, 0.0, (-12.0, -10.0), 0.798139),
        (Preference.SIGMOID, 0.0, (-11.0, -11.0), LN2),
        (Preference.CDPO, 0.1, (-10.0, -12.0), 0.618139),
        (Preference.CDPO, 0.0, (-10.0, -12.0), 0.598139),
        (Preference.ROBUST, 0.1, (-10.0, -12.0), (0.9 * 0.598139 - 0.1 * 0.798139) / 0.8),
        (Preference.ROBUST, 0.1, (-11.0, -11.0), LN2),
        (Preference.IPO, 0.0, (-10.0, -12.0), 9.0),
        (Preference.IPO, 0.0, (-11.0, -11.0), 25.0),
        (Preference.HINGE, 0.0, (-10.0, -12.0), 0.8),
        (Preference.HINGE, 0.0, (0.0, -12.0), 0.0),
    ],
)
def test_preference(kind: Preference, label_smoothing: float, policy: tuple[float, float], expected: float) -> None:
    chosen, rejected = policy
    delta = tensor((chosen + 11) - (rejected + 11))
    assert preference(delta, kind=kind, beta=0.1, label_smoothing=label_smoothing).item() == near(expected)


def test_robust_loss_is_right_on_average_where_labels_are_flipped() -> None:
    """A share of 0.2 of pairs is given the wrong way round: the mean is the loss of clean labels."""
    delta, clean = tensor(3.0), preference(tensor(3.0), kind=Preference.SIGMOID, beta=0.3)
    seen = [preference(d, kind=Preference.ROBUST, beta=0.3, label_smoothing=0.2) for d in (delta, -delta)]
    assert (0.8 * seen[0] + 0.2 * seen[1]).item() == near(clean.item())


def test_bradley_terry() -> None:
    assert bradley_terry(tensor(1.5), tensor(0.5)).item() == near(0.313262)
    assert bradley_terry(tensor(1.5), tensor(0.5), margin=1.0).item() == near(LN2)
    assert bradley_terry(tensor(1.5), tensor(0.5), margin=tensor(1.0)).item() == near(LN2)
    assert bradley_terry(tensor(1.5), tensor(0.5), centering=0.01).item() == near(0.313262 + 0.04)
    assert bradley_terry(tensor(-1e4), tensor(1e4)).item() == 2e4  # no overflow


def test_reference_free_preferences() -> None:
    # beta 2: 2 x (-0.5 + 1) - 0.5 = 0.5
    assert simpo(tensor(-0.5), tensor(-1.0), beta=2.0, gamma=0.5).item() == near(math.log1p(math.exp(-0.5)))
    # p = 0.5 has odds 1, p = 0.2 has odds 1/4
    assert odds_ratio(tensor(math.log(0.5)), tensor(math.log(0.2))).item() == near(-math.log(0.8))
    assert odds_ratio(torch.tensor([0.0]), torch.tensor([-1.0])).isfinite().all()


def test_kto_pulls_good_up_and_bad_down_from_the_reference_point() -> None:
    good = torch.tensor([True, False])
    at_the_point = kto(tensor(0.5, 0.5), good, kl=0.5, beta=0.1, desirable_weight=1.0, undesirable_weight=3.0)
    assert at_the_point.tolist() == near([0.5, 1.5])
    sigmoid = 1 / (1 + math.exp(-0.2))
    assert kto(tensor(2.5, 2.5), good, kl=0.5, beta=0.1).tolist() == near([1 - sigmoid, sigmoid])
    # A negative estimate counts as 0.
    assert kto(tensor(2.0, 2.0), good, kl=-7.0, beta=0.1).tolist() == near([1 - sigmoid, sigmoid])


def test_clipped_surrogate() -> None:
    found = clipped_surrogate(
        tensor(0.5, 1.0, 1.5).log(),
        tensor(1.0, 1.0, 1.0).log(),
        advantages=tensor(1.0, -1.0, 2.0),
        mask=tensor(1, 1, 1),
        clip_low=0.2,
        clip_high=0.2,
    )
    assert found.losses.tolist() == near([-0.5, 1.0, -2.4])
    assert found.ratios.tolist() == near([0.5, 1.0, 1.5])
    assert found.clipped.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "high", "dual_clip", "expected"),
    [
        (1.5, 1.0, 0.2, 0.28, None, -1.28),  # the upper clip is its own
        (0.5, -1.0, 0.2, 0.28, None, 0.8),
        (50.0, -1.0, 0.2, 0.2, None, 50.0),
        (50.0, -1.0, 0.2, 0.2, 3.0, 3.0),
        (2.0, -1.0, 0.2, 0.2, 3.0, 2.0),
        (50.0, 1.0, 0.2, 0.2, 3.0, -1.2),
    ],
)
def test_clips(
    ratio: float, advantage: float, low: float, high: float, dual_clip: float | None, expected: float
) -> None:
    found = clipped_surrogate(
        tensor(ratio).log(),
        tensor(0.0),
        advantages=tensor(advantage),
        mask=tensor(1),
        clip_low=low,
        clip_high=high,
        dual_clip=dual_clip,
    )
    assert found.losses.item() == near(expected)


def test_a_policy_that_is_far_from_the_old_one_has_finite_losses() -> None:
    policy = torch.tensor([1000.0, 1000.0, -1000.0], requires_grad=True)
    found = clipped_surrogate(
        policy,
        torch.zeros(3),
        advantages=torch.tensor([0.0, 1.0, -1.0]),
        mask=torch.ones(3),
        clip_low=0.2,
        clip_high=0.2,
    )
    found.losses.sum().backward()
    assert found.losses.tolist() == near([0.0, -1.2, 0.8])
    assert policy.grad is not None and policy.grad.isfinite().all()


def test_value_losses_take_the_larger_of_clipped_and_free() -> None:
    # (1.5 - 1)^2 against (clip(1.5, 0.9 +- 0.2) - 1)^2 = 0.01; and 0.04 against (1.2 - 3)^2
    found = value_losses(tensor(1.5, 2.8), tensor(0.9, 1.0), returns=tensor(1.0, 3.0), mask=tensor(1, 1), clip=0.2)
    assert found.tolist() == near([0.125, 0.5 * 1.8**2])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (KlEstimator.K1, [-1.0, 14.0, 29.0]),
        (KlEstimator.K2, [0.5, 98.0, 420.5]),
        (KlEstimator.K3, [0.7183, 13.0, 28.0]),
    ],
)
def test_kl_estimates(kind: KlEstimator, expected: list[float]) -> None:
    found = kl_estimates(tensor(-1.0, -1.0, -1.0), tensor(0.0, -15.0, -30.0), kind=kind)
    assert found.tolist() == near(expected, within=1e-4)


def test_kl_estimates_are_right_on_average() -> None:
    p, q = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    true = (p * (p / q).log()).sum().item()
    for kind in (KlEstimator.K1, KlEstimator.K3):
        assert (p * kl_estimates(p.log(), q.log(), kind=kind)).sum().item() == near(true)


@pytest.mark.parametrize(
    ("rewards", "values", "gamma", "lam", "expected"),
    [
        ([0, 0, 5], [1, 2, 3], 1.0, 0.0, [1, 1, 2]),
        ([0, 0, 1], [0.5, 0.5, 0.5], 1.0, 0.95, [0.45125, 0.475, 0.5]),
        ([1, 2, 3], [0, 0, 0], 0.5, 1.0, [1 + 0.5 * 3.5, 3.5, 3]),
    ],
)
def test_generalized_advantages(
    rewards: list[float], values: list[float], gamma: float, lam: float, expected: list[float]
) -> None:
    found, returns = generalized_advantages(tensor(rewards), tensor(values), tensor([1, 1, 1]), gamma=gamma, lam=lam)
    assert found.tolist() == [near(expected)]
    assert returns.tolist() == [near([a + v for a, v in zip(expected, values, strict=True)])]


def test_a_gap_in_a_sequence_is_a_gap_removed() -> None:
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 2, 9, generator=generator, dtype=torch.float64)
    kept = [0, 1, 4, 5, 8]
    mask = torch.zeros(2, 9)
    mask[:, kept] = 1
    gone = mask == 0
    found, returns = generalized_advantages(
        rewards.masked_fill(gone, NAN), values.masked_fill(gone, NAN), mask, gamma=0.9, lam=0.8
    )
    wanted, wanted_returns = generalized_advantages(
        rewards[:, kept], values[:, kept], torch.ones(2, 5), gamma=0.9, lam=0.8
    )
    assert torch.equal(found[:, kept], wanted) and torch.equal(returns[:, kept], wanted_returns)
    assert not found[gone].any() and not returns[gone].any()


def test_whitened_values_have_mean_0_and_variance_1_over_all_ranks() -> None:
    values, mask = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) * 3 + 7, torch.ones(4, 50)
    mask[0, 10:] = 0
    values[mask == 0] = NAN
    found = whiten(values, mask)
    assert found[mask == 1].mean().item() == near(0) and found[mask == 1].var().item() == near(1, within=1e-5)
    assert not found[mask == 0].any()
    assert whiten(values, mask, shift_mean=False)[mask == 1].mean().item() == near(
        values[mask == 1].mean().item(), within=1e-5
    )
    over = moments(values[:1], mask[:1]) + moments(values[1:], mask[1:])
    parts = [whiten(part, kept, over=over) for part, kept in ((values[:1], mask[:1]), (values[1:], mask[1:]))]
    assert torch.cat(parts).sub(found).abs().max().item() == near(0)


def test_whitening_equal_values_gives_zeros() -> None:
    assert whiten(torch.full((3,), 5.0), torch.ones(3)).tolist() == [0, 0, 0]


def test_group_advantages() -> None:
    rewards = tensor([1, 0, 0, 0], [2, 2, 2, 2])
    assert group_advantages(rewards).tolist() == [near([1.5, -0.5, -0.5, -0.5], within=1e-3), [0, 0, 0, 0]]
    assert group_advantages(rewards, scale_by_std=False)[0].tolist() == near([0.75, -0.25, -0.25, -0.25])
    assert leave_one_out_advantages(rewards).tolist() == [near([1, -1 / 3, -1 / 3, -1 / 3]), [0, 0, 0, 0]]
    for advantages in (group_advantages, leave_one_out_advantages):
        with pytest.raises(ValueError, match="use 2 or more"):
            advantages(tensor([1.0]))


@pytest.mark.parametrize(
    ("kind", "weights", "divisor"),
    [
        (Aggregation.TOKEN, [0, 1, 1, 1, 0, 0, 1, 0], 4),
        (Aggregation.SEQUENCE, [0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 1, 0], 2),
        (Aggregation.CONSTANT, [0, 0.1, 0.1, 0.1, 0, 0, 0.1, 0], 2),
    ],
)
def test_token_weights(kind: Aggregation, weights: list[float], divisor: int) -> None:
    """Sequences of 3, 0 and 1 tokens that count, and padding."""
    mask, sequences = torch.tensor([0.0, 1, 1, 1, 0, 0, 1, 0]), torch.tensor([0, 0, 0, 0, 1, 2, 2, 3])
    found, count = token_weights(mask, sequences, num_sequences=4, kind=kind, longest=10)
    assert found.tolist() == near(weights) and count.item() == divisor


def test_likelihood_and_entropy() -> None:
    logits = torch.tensor([[[0.25, 0.25, 0.5], [1.0, 0.0, 0.0]]]).log()
    labels = torch.tensor([[2, 0]])
    assert token_log_probs(logits, labels)[0].tolist() == near([-LN2, 0.0])
    assert token_entropy(logits)[0].tolist() == near([1.5 * LN2, 0.0])
    total, count = supervised(token_log_probs(logits, labels), torch.tensor([[1.0, 0.0]]))
    assert (total.item(), count.item()) == (near(LN2), 1)


# Gradients ---------------------------------------------------------------------------------------------------------

MASK = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)


def numbers(seed: int, size: int = 6) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{
        f"preference {kind}": lambda x, kind=kind: preference(x, kind=kind, beta=0.3, label_smoothing=0.1)  # type: ignore[misc]
        for kind in Preference
    },
    "bradley_terry": lambda x: bradley_terry(x, numbers(1), margin=0.2, centering=0.01),
    "simpo": lambda x: simpo(x, numbers(1), beta=2.0, gamma=0.5),
    "odds_ratio": lambda x: odds_ratio(-x.abs() - 0.1, -numbers(1).abs() - 0.1),
    "kto": lambda x: kto(x, numbers(1) > 0, kl=0.3, beta=0.5),
    "surrogate": lambda x: (
        clipped_surrogate(
            x * 0.3,
            numbers(1) * 0.3,
            advantages=numbers(2),
            mask=MASK,
            clip_low=0.1,
            clip_high=0.2,
            dual_clip=1.1,
        ).losses
    ),
    "value": lambda x: value_losses(x, numbers(1), returns=numbers(2), mask=MASK, clip=0.3),
    "supervised": lambda x: supervised(x, MASK)[0],
    "entropy": lambda x: token_entropy(x.double()[None, None]),
    **{f"kl {kind}": lambda x, kind=kind: kl_estimates(x, numbers(1), kind=kind) for kind in KlEstimator},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    x = numbers(7).requires_grad_()
    if name == "entropy":  # computed in fp32
        assert torch.autograd.gradcheck(GRADIENTS[name], x, eps=1e-2, atol=1e-3, rtol=1e-2)
    else:
        assert torch.autograd.gradcheck(GRADIENTS[name], x)


def test_an_advantage_has_no_gradient() -> None:
    values = numbers(1)[None].requires_grad_()
    advantages, returns = generalized_advantages(numbers(2)[None], values, MASK[None], gamma=1.0, lam=0.95)
    assert not advantages.requires_grad and not returns.requires_grad


# Masks -------------------------------------------------------------------------------------------------------------

HIDING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "masked_sum": lambda x: masked_sum(x, MASK),
    "supervised": lambda x: supervised(x, MASK)[0],
    "surrogate": lambda x: (
        clipped_surrogate(
            x, numbers(1), advantages=numbers(2), mask=MASK, clip_low=0.2, clip_high=0.2, dual_clip=3.0
        ).losses
    ),
    "value": lambda x: value_losses(x, numbers(1), returns=numbers(2), mask=MASK, clip=0.2),
    "whiten": lambda x: whiten(x, MASK),
    "moments": lambda x: moments(x, MASK),
}


@pytest.mark.parametrize("hidden", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("name", HIDING)
def test_what_is_masked_reaches_neither_sums_nor_gradients(name: str, hidden: float) -> None:
    clean = numbers(7).requires_grad_()
    poisoned = numbers(7).masked_fill(MASK == 0, hidden).requires_grad_()
    sums = [HIDING[name](x).double() for x in (clean, poisoned)]
    assert sums[0].tolist() == sums[1].tolist()
    for total in sums:
        total.square().sum().backward()
    assert clean.grad is not None and poisoned.grad is not None
    assert poisoned.grad.isfinite().all() and not poisoned.grad[MASK == 0].any()
    assert torch.equal(clean.grad, poisoned.grad)


def test_old_log_probs_and_advantages_are_masked_too() -> None:
    poisoned = numbers(1).masked_fill(MASK == 0, NAN)
    policy = numbers(7).requires_grad_()
    losses = clipped_surrogate(policy, poisoned, advantages=poisoned, mask=MASK, clip_low=0.2, clip_high=0.2).losses
    losses.sum().backward()
    assert policy.grad is not None and policy.grad.isfinite().all()


def test_a_token_that_cannot_come_has_no_part_in_the_entropy_nor_a_gradient() -> None:
    logits = torch.tensor([[[0.1, 0.7, -math.inf]]], requires_grad=True)
    token_entropy(logits).sum().backward()
    assert token_entropy(logits).item() == near(token_entropy(logits[..., :2]).item())
    assert logits.grad is not None and logits.grad.isfinite().all()
