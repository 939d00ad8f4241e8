"""Which token comes next: by hand, by frequency, and never one that was left out."""

import math

import numpy as np
import pytest
import torch

from headrace_trainer.engine.sampling import Sampling, choose, uniform_draws

PROBS = [0.1, 0.4, 0.2, 0.3]


def drawn(draws: list[float], **settings: float | int | None) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities for draws from ``PROBS``."""
    logits = torch.tensor([PROBS]).log().expand(len(draws), -1) + 5
    tokens, log_probs = choose(
        logits,
        Sampling(max_new_tokens=1, **settings),  # type: ignore[arg-type]
        torch.tensor(draws, dtype=torch.float64),
    )
    return tokens.tolist(), log_probs.tolist()


@pytest.mark.parametrize(
    ("settings", "draws", "tokens"),
    [
        ({}, [0.0, 0.099, 0.101, 0.499, 0.501, 0.699, 0.701, 0.999999], [0, 0, 1, 1, 2, 2, 3, 3]),
        ({"temperature": 0.0}, [0.0, 0.999], [1, 1]),
        ({"top_k": 1}, [0.0, 0.999], [1, 1]),
        ({"top_k": 2}, [0.0, 0.57, 0.58, 0.999], [1, 1, 3, 3]),
        ({"top_k": 100}, [0.05, 0.999], [0, 3]),
        ({"top_p": 0.39}, [0.0, 0.999], [1, 1]),
        ({"top_p": 0.41}, [0.0, 0.999], [1, 3]),
        ({"top_p": 0.0}, [0.0, 0.999], [1, 1]),
        ({"top_k": 2, "top_p": 0.5}, [0.0, 0.999], [1, 1]),
        # p^2 in proportion: 1, 16, 4, 9 of 30
        ({"temperature": 0.5}, [0.03, 0.04, 0.56, 0.57, 0.69, 0.71], [0, 1, 1, 2, 2, 3]),
    ],
)
def test_a_draw_picks_the_token_at_its_part_of_the_sum(
    settings: dict[str, float], draws: list[float], tokens: list[int]
) -> None:
    assert drawn(draws, **settings)[0] == tokens


def test_log_probs_are_those_at_the_temperature_before_any_token_is_left_out() -> None:
    assert drawn([0.0], top_k=1, top_p=0.1)[1] == pytest.approx([math.log(0.4)])
    assert drawn([0.0], temperature=0.0)[1] == pytest.approx([math.log(0.4)])
    assert drawn([0.5], temperature=0.5)[1] == pytest.approx([math.log(16 / 30)])


def test_tokens_come_as_often_as_they_should() -> None:
    """20,000 draws of sequences named 0 to 199; seed 3."""
    draws = np.concatenate([uniform_draws(Sampling(max_new_tokens=100, seed=3), str(i)) for i in range(200)])
    tokens, _ = drawn(draws.tolist())
    counts = np.bincount(tokens, minlength=4)
    expected = len(draws) * np.array(PROBS)
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-squared, 3 degrees of freedom: 1 in 1,000


def test_a_token_that_cannot_come_does_not() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(2, -1)
    tokens, log_probs = choose(logits, Sampling(max_new_tokens=1), torch.tensor([0.0, 1.0]).double())
    assert tokens.tolist() == [1, 1] and log_probs.tolist() == [0.0, 0.0]


def test_draws_depend_on_the_seed_and_the_name_alone() -> None:
    def draws(name: str, *, seed: int = 1, length: int = 8) -> list[float]:
        return uniform_draws(Sampling(max_new_tokens=length, seed=seed), name).tolist()

    assert draws("a") == draws("a") == draws("a", length=20)[:8]
    assert len({tuple(d) for d in (draws("a"), draws("b"), draws("a", seed=2))}) == 3
