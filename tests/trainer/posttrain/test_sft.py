"""Supervised fine-tuning, whole: records in, a model that has learned them out, under every layout."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from headrace_api.contract import ResolvedStage
from trainer.engine.gangs import DP2, PP2, TP1, TP2, TP2_PP2, gang
from trainer.posttrain.chain import Base, further, pretrained, stage_rank, trained, write_records

WORDS = ("lamp", "storm", "boat", "gull", "wall", "horn", "oil", "fog", "map", "beach", "page", "deck")


def conversations(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    out = []
    for _ in range(count):
        one, other = draw.choices(WORDS, k=2)
        out.append(
            {
                "messages": [
                    {"role": "user", "content": f"Spell {one} and {other}"},
                    {"role": "assistant", "content": f"{' '.join(one)}, {' '.join(other)}"},
                ]
            }
        )
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"))


def block(data: Path, **fields: Any) -> dict[str, Any]:
    return {
        "from": {"model": "base"},
        "data": {"sources": [{"uri": str(data)}], "validation": {"fraction": 0.1}},
        "epochs": 2,
        "sequenceLength": 64,
        "globalBatchSize": 4,
        "microBatchSize": 2,
        "precision": "fp32",
        "schedule": {"learningRate": 3e-3, "warmup": 2},
        "checkpoint": {"every": 4},
    } | fields


def sft(base: Base, folder: Path, layout: dict[str, int] = TP1, *, attempt: int = 1, **fields: Any) -> ResolvedStage:
    """A stage on 200 conversations, in a storage of its own."""
    data = write_records(folder / "chat.jsonl", conversations(200))
    return further(base, folder, {"sft": block(data, **fields)}, layout, name="sft", attempt=attempt)


@pytest.fixture(scope="module")
def undisturbed(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return trained(sft(base, folder), folder)


def test_a_model_learns_its_demonstrations(undisturbed: list[dict[str, Any]]) -> None:
    losses = [r["loss"] for r in undisturbed]
    assert losses[0] > 5
    assert sum(losses[-4:]) / 4 < 1.6
    assert undisturbed[-1]["validation_loss"] < losses[0]


@pytest.mark.parametrize(
    ("layout", "micro_batch_size"),
    [(TP1, 1), (TP1, 4), (TP2, 2), (PP2, 2), (DP2, 2), (TP2_PP2, 2)],
    ids=["micro-batch 1", "micro-batch 4", "TP2", "PP2", "DP2", "TP2xPP2"],
)
def test_losses_do_not_depend_on_how_a_batch_is_cut(
    base: Base, tmp_path: Path, undisturbed: list[dict[str, Any]], layout: dict[str, int], micro_batch_size: int
) -> None:
    records = trained(sft(base, tmp_path, layout, microBatchSize=micro_batch_size), tmp_path)
    for figure in ("loss", "validation_loss"):
        expected = [r[figure] for r in undisturbed if figure in r]
        assert [r[figure] for r in records if figure in r] == pytest.approx(expected, abs=1e-5, rel=0)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_a_killed_stage_goes_on_bit_for_bit(base: Base, tmp_path: Path, packing: bool) -> None:
    whole = trained(sft(base, tmp_path / "whole", DP2, packing=packing), tmp_path / "whole")
    seed = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(10**6)))
    print(f"HEADRACE_TEST_SEED={seed}")
    die_at = random.Random(seed).randrange(5, len(whole) - 1)
    killed = gang(stage_rank, 2, sft(base, tmp_path, DP2, packing=packing), tmp_path, die_at)
    assert killed[-1].exit_code == -signal.SIGKILL
    resumed = trained(sft(base, tmp_path, DP2, packing=packing, attempt=2), tmp_path)
    assert [r["loss_hex"] for r in resumed] == [r["loss_hex"] for r in whole]


def test_other_records_are_another_training(base: Base, tmp_path: Path) -> None:
    stage = sft(base, tmp_path)
    (killed,) = gang(stage_rank, 1, stage, tmp_path, 9)
    assert killed.exit_code == -signal.SIGKILL
    write_records(tmp_path / "chat.jsonl", conversations(200, seed=1))
    changed = stage.model_copy(update={"attempt": 2})
    (ended,) = gang(stage_rank, 1, changed, tmp_path)
    assert ended.error == "UserError"
    assert "data" in ended.message
