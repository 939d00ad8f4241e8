"""The dpo losses that ask no reference model, or learn from single answers: whole stages, under every layout."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from headrace_api.contract import ResolvedStage
from trainer.engine.gangs import DP2, PP2, TP1, TP2, gang
from trainer.posttrain.chain import Base, further, pairs_block, pretrained, stage_rank, trained, write_records
from trainer.posttrain.test_dpo import pairs
from trainer.posttrain.test_sft import WORDS

LOSSES = ("orpo", "simpo", "kto")
SLOW: dict[str, Any] = {"epochs": 1, "schedule": {"learningRate": 3e-4, "warmup": 2}}
"""A rate at which Adam does not make a difference in the last digit large."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"))


def labelled(count: int) -> list[dict[str, Any]]:
    """The sides of pairs, one each: a wanted answer to one prompt, an unwanted one to the next."""
    sides = (("chosen", True), ("rejected", False))
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": label}
        for pair, (side, label) in zip(pairs(count, seed=1), sides * count, strict=False)
    ]


def stage(
    base: Base,
    folder: Path,
    loss: str,
    layout: dict[str, int] = TP1,
    *,
    records: list[dict[str, Any]] | None = None,
    attempt: int = 1,
    **fields: Any,
) -> ResolvedStage:
    if records is None:
        records = labelled(240) if loss == "kto" else pairs(160)
    data = write_records(folder / "records.jsonl", records)
    block = pairs_block(data, loss=loss, samples={"count": 0}, **fields)
    return further(base, folder, {"dpo": block}, layout, name="dpo", attempt=attempt)


@pytest.fixture(scope="module", params=LOSSES)
def undisturbed(
    request: pytest.FixtureRequest, base: Base, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return request.param, trained(stage(base, folder, request.param, **SLOW), folder)


@pytest.mark.parametrize("layout", [TP2, PP2, DP2, TP1], ids=["TP2", "PP2", "DP2", "micro-batch 4"])
def test_losses_do_not_depend_on_how_a_batch_is_cut(
    base: Base, tmp_path: Path, undisturbed: tuple[str, list[dict[str, Any]]], layout: dict[str, int]
) -> None:
    """KTO's reference point too, which other frameworks take from one micro-batch."""
    loss, expected = undisturbed
    size = {"microBatchSize": 4} if layout is TP1 else {}
    records = trained(stage(base, tmp_path, loss, layout, **size, **SLOW), tmp_path)
    for figure in ("loss", "rewards/margins", "validation_loss", *(["kl"] if loss == "kto" else [])):
        wanted = [r[figure] for r in expected if figure in r]
        assert wanted
        assert [r[figure] for r in records if figure in r] == pytest.approx(wanted, abs=1e-5, rel=0), figure


def test_a_killed_stage_goes_on_bit_for_bit(
    base: Base, tmp_path: Path, undisturbed: tuple[str, list[dict[str, Any]]]
) -> None:
    loss, _ = undisturbed
    whole = trained(stage(base, tmp_path / "whole", loss, DP2), tmp_path / "whole")
    seed = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(10**6)))
    print(f"HEADRACE_TEST_SEED={seed}")
    die_at = random.Random(seed).randrange(5, len(whole) - 1)
    killed = gang(stage_rank, 2, stage(base, tmp_path, loss, DP2), tmp_path, die_at)
    assert killed[-1].exit_code == -signal.SIGKILL
    resumed = trained(stage(base, tmp_path, loss, DP2, attempt=2), tmp_path)
    assert [r["loss_hex"] for r in resumed] == [r["loss_hex"] for r in whole]


def polite(count: int) -> list[dict[str, Any]]:
    """Of two answers to the same request, the polite one is preferred; it comes as often first as second in the alphabet."""
    draw = random.Random(4)
    forms = (("please the {}", "now the {}"), ("kindly the {}", "only the {}"))
    out = []
    for _ in range(count):
        one, other = draw.sample(WORDS, 2)
        better, worse = draw.choice(forms)
        out.append({"prompt": f"{one} or {other}? ", "chosen": better.format(one), "rejected": worse.format(one)})
    return out


@pytest.mark.parametrize(("loss", "fields"), [("orpo", {"beta": 1.0}), ("simpo", {}), ("kto", {})])
def test_it_learns_a_preference_for_prompts_that_it_has_not_seen(
    base: Base, tmp_path: Path, loss: str, fields: dict[str, Any]
) -> None:
    rate = {"schedule": {"learningRate": 2e-3, "warmup": 2}}
    records = trained(stage(base, tmp_path, loss, records=polite(200), epochs=3, **rate, **fields), tmp_path)
    assert records[-1]["validation_rewards/accuracies"] > 0.95
    assert records[-1]["validation_rewards/margins"] > 0
    if loss == "kto":
        assert records[0]["loss"] == pytest.approx(0.5, abs=1e-6)
        assert records[0]["kl"] == pytest.approx(0, abs=1e-4)
        assert max(r["kl"] for r in records) > 0.01


def test_no_reference_is_asked_where_none_is_needed(
    base: Base, tmp_path: Path, undisturbed: tuple[str, list[dict[str, Any]]]
) -> None:
    loss, _ = undisturbed
    trained(stage(base, tmp_path, loss, epochs=0.2), tmp_path)
    assert (tmp_path / "storage/dpo/reference").exists() == (loss == "kto")


def test_the_weights_of_wanted_and_unwanted_examples_scale_their_losses(base: Base, tmp_path: Path) -> None:
    """At the first step every example has the loss 1 / 2."""
    fields = {"desirableWeight": 3.0, "undesirableWeight": 0.5, "globalBatchSize": 200, "microBatchSize": 4}
    made = stage(base, tmp_path, "kto", records=labelled(220), epochs=0.5, **fields, schedule={"learningRate": 1e-3})
    (first,) = trained(made, tmp_path)
    report = json.loads((tmp_path / "storage/dpo/data.json").read_text())
    assert report["sources"][0]["train"] >= 190
    assert 0.25 < first["loss"] < 1.5
    assert first["loss"] == pytest.approx((3.0 + 0.5) / 4, abs=0.1)


def test_each_side_of_a_pair_is_an_example_of_kto(base: Base, tmp_path: Path) -> None:
    trained(stage(base, tmp_path, "kto", records=pairs(60), epochs=0.3), tmp_path)
    (source,) = json.loads((tmp_path / "storage/dpo/data.json").read_text())["sources"]
    assert source["train"] + source["validation"] == 120
    assert source["validation"] % 2 == 0, "sides of one pair are on the same side"
    examples = (tmp_path / "storage/dpo/examples.md").read_text()
    assert "label true" in examples and "label false" in examples


@pytest.mark.parametrize(
    ("loss", "records", "said"),
    [
        ("orpo", [{"prompt": "a ", "chosen": "b", "rejected": "b"}], "equalSides"),
        ("simpo", [{"prompt": "a ", "chosen": "b", "rejected": " "}], "'rejected' is empty"),
        ("kto", [{"prompt": "a ", "completion": "", "label": True}], "'completion' is empty"),
        ("kto", [{"prompt": "a ", "completion": "b"}], "prompt, completion, label"),
        (
            "kto",
            [{"prompt": "a ", "completion": "b", "label": True}, {"prompt": "a ", "completion": "c"}],
            "no 'label'",
        ),
        (
            "kto",
            [{"prompt": f"{i} ", "completion": "b", "label": True} for i in range(9)],
            "dpo.data: all 9 examples have the label true: kto needs some with the label false",
        ),
        ("orpo", [{"prompt": "a ", "completion": "b", "label": True}], "prompt, chosen, rejected"),
    ],
)
def test_records_that_cannot_be_learned_from_are_named(
    base: Base, tmp_path: Path, loss: str, records: list[dict[str, Any]], said: str
) -> None:
    data = {"sources": [{"uri": str(write_records(tmp_path / "records.jsonl", records))}]}
    block = {"from": {"model": "base"}, "loss": loss, "data": data, "globalBatchSize": 2, "precision": "fp32"}
    ended = gang(stage_rank, 1, further(base, tmp_path, {"dpo": block}, TP1, name="dpo"), tmp_path)
    assert ended[0].error == "UserError"
    assert said in ended[0].message
