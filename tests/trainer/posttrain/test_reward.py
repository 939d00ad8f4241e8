"""Reward modelling, whole: pairs in, a model that scores the better side higher out, under every layout."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace_api.contract import ResolvedStage
from headrace_trainer.stages.reward.report import assess
from trainer.engine.gangs import DP2, PP2, TP1, TP2, gang
from trainer.posttrain.chain import Base, further, pairs_block, pretrained, stage_rank, trained, write_records
from trainer.posttrain.test_dpo import pairs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"))


def reward(base: Base, folder: Path, layout: dict[str, int] = TP1, *, attempt: int = 1, **fields: Any) -> ResolvedStage:
    data = write_records(folder / "pairs.jsonl", pairs(160))
    block = pairs_block(data, **fields)
    return further(base, folder, {"reward": block}, layout, name="rm", attempt=attempt)


@pytest.fixture(scope="module")
def one_rank(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("one")
    return folder, trained(reward(base, folder), folder)


def test_it_learns_to_score_and_says_how_well(one_rank: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, records = one_rank
    assert sum(r["accuracy"] for r in records[-5:]) / 5 > 0.9
    found = json.loads((folder / "storage/rm/reward.json").read_text())
    assert found["accuracy"] > 0.8
    assert sum(c["pairs"] for c in found["calibration"]) == found["pairs"] > 5
    assert found["accuracy"] == pytest.approx(records[-1]["validation_accuracy"])
    assert "scores higher in" in (folder / "storage/rm/reward.md").read_text()


def test_losses_do_not_depend_on_the_layout(base: Base, tmp_path: Path) -> None:
    """At a rate at which Adam does not make a difference in the last digit large."""
    slow = {"schedule": {"learningRate": 3e-4, "warmup": 2}}
    found = {}
    for name, layout in {"one": TP1, "TP2": TP2, "PP2": PP2, "DP2": DP2}.items():
        found[name] = [r["loss"] for r in trained(reward(base, tmp_path / name, layout, **slow), tmp_path / name)]
        assert found[name] == pytest.approx(found["one"], abs=1e-5, rel=0), name
    assert found["one"][-1] < found["one"][0]


def test_a_killed_stage_goes_on_bit_for_bit(base: Base, tmp_path: Path) -> None:
    whole = trained(reward(base, tmp_path / "whole", DP2), tmp_path / "whole")
    killed = gang(stage_rank, 2, reward(base, tmp_path, DP2), tmp_path, 9)
    assert killed[-1].exit_code == -signal.SIGKILL
    resumed = trained(reward(base, tmp_path, DP2, attempt=2), tmp_path)
    assert [r["loss_hex"] for r in resumed] == [r["loss_hex"] for r in whole]


def test_a_model_that_scores_length_is_told_from_one_that_scores_what_was_asked() -> None:
    draw = random.Random(0)
    lengths = np.array([[draw.randrange(5, 50), draw.randrange(5, 50)] for _ in range(400)])
    by_length = assess(lengths.astype(np.float32), lengths)
    assert by_length.longer_is_scored_higher == 1
    assert by_length.length_correlation > 0.99
    assert 0.4 < by_length.accuracy < 0.6
    fair = assess(np.array([[draw.gauss(1, 1), draw.gauss(0, 1)] for _ in range(400)], dtype=np.float32), lengths)
    assert abs(fair.length_correlation) < 0.2
    assert 0.4 < fair.longer_is_scored_higher < 0.6


def test_calibration_holds_predictions_against_what_happened() -> None:
    """Scores whose difference is the log-odds that a pair was drawn with."""
    draw = np.random.default_rng(0)
    margins = draw.normal(0, 2, 20_000)
    won = draw.random(20_000) < 1 / (1 + np.exp(-margins))
    scores = np.stack([np.where(won, margins, -margins), np.zeros(20_000)], axis=1)
    for part in assess(scores, np.ones_like(scores)).calibration:
        assert part.pairs > 500
        assert part.right == pytest.approx(part.predicted, abs=0.04)
