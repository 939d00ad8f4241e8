"""The same losses under every layout, and the same as plain torch: layouts and padding change nothing but speed."""

from pathlib import Path

import pytest

from trainer.engine.gangs import DP2, PP2, TP1, TP2, TP2_PP2, Run, losses


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(Run(folder=tmp_path_factory.mktemp("one")), TP1)


def test_one_rank_learns(one_rank: list[float]) -> None:
    assert len(one_rank) == 20
    assert one_rank[-1] < one_rank[0] - 0.3


@pytest.mark.parametrize(
    "layout",
    [TP2, PP2, DP2, pytest.param(TP2_PP2, marks=pytest.mark.slow)],
    ids=["TP2", "PP2", "DP2", "TP2xPP2"],
)
def test_every_layout_gives_the_losses_of_one_rank(
    tmp_path: Path, one_rank: list[float], layout: dict[str, int]
) -> None:
    assert losses(Run(folder=tmp_path), layout) == pytest.approx(one_rank, abs=1e-5, rel=0)
