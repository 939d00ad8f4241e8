"""Reinforcement learning, whole: prompts and a rule in, a model whose answers follow the rule out."""

from pathlib import Path
from typing import Any

import pytest

from headrace_api.contract import ResolvedStage
from trainer.engine.gangs import TP1, gang
from trainer.posttrain.chain import Base, history, pretrained, resolved, stage_rank, write_records

VOWELS = {"regex": {"pattern": "^[ ]*[aeiou]"}}
"""An answer that begins with a vowel."""
WORDS = ("lamp", "storm", "boat", "gull", "wall", "horn", "oil", "fog", "map", "beach", "page", "deck")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"))


def rl(base: Base, folder: Path, layout: dict[str, int] = TP1, *, attempt: int = 1, **fields: Any) -> ResolvedStage:
    prompts = [{"prompt": f"Say something of the {word}: "} for word in WORDS]
    data = write_records(folder / "prompts.jsonl", prompts)
    block = {
        "from": {"model": "base"},
        "data": {"sources": [{"uri": str(data)}]},
        "rewards": [{"rule": VOWELS}],
        "epochs": 10,
        "promptsPerIteration": 6,
        "groupSize": 8,
        "globalBatchSize": 48,
        "microBatchSize": 12,
        "sequenceLength": 32,
        "maxNewTokens": 3,
        "precision": "fp32",
        "schedule": {"learningRate": 3e-3, "decay": "constant"},
        "checkpoint": {"every": 4},
        "parallelism": {"tensor": layout["tensor"], "pipeline": layout["pipeline"]},
    } | fields
    return resolved(
        base.storage.model_copy(update={"uri": str(folder / "storage")}),
        "rl",
        {"rl": block},
        inputs={"model": base.model},
        attempt=attempt,
        ranks=layout["tensor"] * layout["pipeline"] * layout["data"],
    )


def trained(stage: ResolvedStage, folder: Path) -> list[dict[str, Any]]:
    ended = gang(stage_rank, stage.stage.compute.world, stage, folder)
    assert not any(e.error for e in ended), ended
    return history(stage)


def test_grpo_learns_the_rule(base: Base, tmp_path: Path) -> None:
    records = trained(rl(base, tmp_path), tmp_path)
    for r in records:
        print(
            {k: (round(v, 4) if isinstance(v, float) else v) for k, v in r.items() if k not in ("loss_hex", "tokens")}
        )
    print((tmp_path / "storage/rl/answers.md").read_text())
    assert records[0]["reward"] < 0.5
    assert sum(r["reward"] for r in records[-4:]) / 4 > 0.9
