"""Preference training, whole: pairs in, a model that prefers the chosen sides out, under every layout."""

import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from headrace_api.contract import ResolvedStage
from trainer.engine.gangs import DP2, PP2, TP1, TP2, gang
from trainer.posttrain.chain import Base, further, pairs_block, pretrained, stage_rank, trained, write_records
from trainer.posttrain.test_sft import WORDS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"))


def pairs(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Of two words the one that comes later in the alphabet is preferred."""
    draw = random.Random(seed)
    out = []
    for _ in range(count):
        worse, better = sorted(draw.sample(WORDS, 2))
        out.append({"prompt": f"{worse} or {better}? ", "chosen": f"the {better}", "rejected": f"the {worse}"})
    return out


def dpo(base: Base, folder: Path, layout: dict[str, int] = TP1, *, attempt: int = 1, **fields: Any) -> ResolvedStage:
    data = write_records(folder / "pairs.jsonl", pairs(160))
    block = pairs_block(data, **({"beta": 0.1} | fields))
    return further(base, folder, {"dpo": block}, layout, name="dpo", attempt=attempt)


@pytest.fixture(scope="module")
def undisturbed(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return trained(dpo(base, folder), folder)


def test_it_begins_at_ln_2_and_ends_with_the_preferred_side(undisturbed: list[dict[str, Any]]) -> None:
    assert undisturbed[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert undisturbed[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert sum(r["rewards/accuracies"] for r in undisturbed[-5:]) / 5 > 0.8
    assert sum(r["loss"] for r in undisturbed[-5:]) / 5 < 0.5
    assert undisturbed[-1]["validation_rewards/accuracies"] > 0.8


@pytest.mark.parametrize("layout", [TP2, PP2, DP2], ids=["TP2", "PP2", "DP2"])
def test_losses_do_not_depend_on_the_layout(
    base: Base, tmp_path: Path, undisturbed: list[dict[str, Any]], layout: dict[str, int]
) -> None:
    records = trained(dpo(base, tmp_path, layout), tmp_path)
    for figure in ("loss", "rewards/margins", "validation_loss"):
        expected = [r[figure] for r in undisturbed if figure in r]
        assert [r[figure] for r in records if figure in r] == pytest.approx(expected, abs=1e-5, rel=0), figure


def test_packed_pairs_have_the_losses_of_unpacked_ones(base: Base, tmp_path: Path) -> None:
    """All pairs in one step: however they are packed, the mean is over the same pairs."""
    ends = []
    for name, fields in {
        "unpacked": {"globalBatchSize": 160},
        "packed": {"packing": True, "globalBatchSize": 160},
    }.items():
        folder = tmp_path / name
        stage = dpo(base, folder, **fields, microBatchSize=4, epochs=1, schedule={"learningRate": 1e-3, "warmup": 0})
        ends.append(trained(stage, folder)[0])
    assert ends[0]["loss"] == pytest.approx(ends[1]["loss"], abs=1e-5)


def test_a_killed_stage_goes_on_bit_for_bit_and_asks_the_reference_once(base: Base, tmp_path: Path) -> None:
    whole = trained(dpo(base, tmp_path / "whole", DP2), tmp_path / "whole")
    seed = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(10**6)))
    print(f"HEADRACE_TEST_SEED={seed}")
    killed = gang(stage_rank, 2, dpo(base, tmp_path, DP2), tmp_path, random.Random(seed).randrange(5, len(whole) - 1))
    assert killed[-1].exit_code == -signal.SIGKILL
    (kept,) = (tmp_path / "storage/dpo/reference").iterdir()
    stamp = kept.stat().st_mtime_ns
    resumed = trained(dpo(base, tmp_path, DP2, attempt=2), tmp_path)
    assert [r["loss_hex"] for r in resumed] == [r["loss_hex"] for r in whole]
    assert stamp > 0
