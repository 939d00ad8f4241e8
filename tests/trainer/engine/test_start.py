"""Start weights: what they look like, what they depend on, and that a rank draws no more than it needs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from headrace_api.model import Architecture
from trainer.engine.gangs import PP2, TP1, TP2, Run, gang, train, train_rank
from trainer.engine.test_model import built, start_weights

LARGE = Architecture(layers=2, hidden_size=1536, heads=12, kv_heads=4, ffn_hidden_size=1200, init_std=0.03)
"""Matrices of several tiles each way, cut in the middle of tiles, and no side a multiple of a tile's."""
RESIDUAL = ("linear_proj", "linear_fc2")


def matrices(weights: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every matrix of a model, layer by layer."""
    for key, tensor in weights.items():
        if "norm" not in key:
            parts = tensor if tensor.dim() == 3 else [tensor]
            yield from ((f"{key} {i}", part) for i, part in enumerate(parts))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return start_weights(tmp_path_factory.mktemp("weights"), TP1, LARGE)


def test_matrices_are_normal_and_those_of_the_residual_stream_narrower(weights: dict[str, Any]) -> None:
    for name, matrix in matrices(weights):
        std = 0.03 / math.sqrt(4) if any(part in name for part in RESIDUAL) else 0.03
        n = matrix.numel()
        z = matrix.double() / std
        assert abs(z.mean()) < 4 / math.sqrt(n), name
        assert z.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * n)), name
        assert (z**3).mean().item() == pytest.approx(0, abs=4 * math.sqrt(15 / n)), name
        assert (z**4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96 / n)), name


def test_norms_start_at_one(weights: dict[str, Any]) -> None:
    norms = {key: tensor for key, tensor in weights.items() if "norm" in key}
    assert len(norms) == 3
    assert all((tensor == 1).all() for tensor in norms.values())


def test_no_part_repeats_another(weights: dict[str, Any]) -> None:
    """Rows of a matrix, its tiles, its layers, and other matrices of the same shape."""
    import torch

    for name, matrix in matrices(weights):
        rows = torch.nn.functional.normalize(matrix, dim=1)
        similar = (rows @ rows.T).fill_diagonal_(0).abs().max().item()
        assert similar < 8 / math.sqrt(matrix.size(1)), name
        columns = torch.nn.functional.normalize(matrix, dim=0)
        similar = (columns.T @ columns).fill_diagonal_(0).abs().max().item()
        assert similar < 8 / math.sqrt(matrix.size(0)), name
    for (one, first), (other, second) in combinations(matrices(weights), 2):
        assert first.shape != second.shape or correlation(first, second) < 0.01, (one, other)


def correlation(one: Any, other: Any) -> float:
    import torch

    return abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item())


def test_another_seed_gives_another_model(tmp_path: Path, weights: dict[str, Any]) -> None:
    other = dict(matrices(start_weights(tmp_path, TP1, LARGE, seed=8)))
    for name, matrix in matrices(weights):
        assert correlation(matrix, other[name]) < 0.01, name


@pytest.mark.parametrize("layout", [TP2, PP2], ids=["TP2", "PP2"])
def test_every_layout_draws_the_same_bits(tmp_path: Path, weights: dict[str, Any], layout: dict[str, int]) -> None:
    import torch

    other = start_weights(tmp_path, layout, LARGE)
    assert other.keys() == weights.keys()
    assert all(torch.equal(other[key], weights[key]) for key in weights)


@contextmanager
def counted() -> Iterator[list[int]]:
    """The size of every draw of normal numbers."""
    import numpy as np

    draws: list[int] = []
    original = np.random.Generator

    class Counting(original):  # type: ignore[misc, valid-type]
        def standard_normal(self, *args: Any, **kwargs: Any) -> Any:
            drawn = super().standard_normal(*args, **kwargs)
            draws.append(drawn.size)
            return drawn

    np.random.Generator = Counting  # type: ignore[misc]
    try:
        yield draws
    finally:
        np.random.Generator = original  # type: ignore[misc]


def draws_of(rank: int, world: int, layout: dict[str, int]) -> tuple[list[int], int]:
    with counted() as draws, built(rank, layout, LARGE) as (_, model):
        return draws, sum(p.numel() for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize(("layout", "world"), [(TP1, 1), (TP2, 2), (PP2, 2)], ids=["TP1", "TP2", "PP2"])
def test_a_rank_draws_its_own_part_and_holds_little_of_it_at_a_time(layout: dict[str, int], world: int) -> None:
    for ended in gang(draws_of, world, layout):
        assert not ended.error, ended
        draws, kept = ended.value
        # A tile that is cut between two ranks is drawn by both.
        assert kept <= sum(draws) < 1.35 * kept
        assert max(draws) <= 2**17


def draws_while_training(rank: int, world: int, run: Run, layout: dict[str, int]) -> tuple[int, int]:
    with counted() as draws:
        trained = train_rank(rank, world, run, layout)
    return trained.first_step, sum(draws)


def test_nothing_is_drawn_where_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, steps=5, stop_at=2)
    assert train(run, TP1)[0].error == "Stopped"
    run = replace(run, stop_at=None, attempt=2)
    (resumed,) = gang(draws_while_training, 1, run, TP1)
    (fresh,) = gang(draws_while_training, 1, replace(run, folder=tmp_path / "fresh"), TP1)
    assert (resumed.error, fresh.error) == ("", "")
    assert resumed.value[0] > 0
    assert resumed.value[1] == 0
    assert fresh.value[1] > 0
