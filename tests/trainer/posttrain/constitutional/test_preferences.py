"""Answers that are compared, and the stages that read what is left of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from headrace_api.artifact import ArtifactRef
from trainer.posttrain.chain import Base, history, write_records
from trainer.posttrain.constitutional.critics import Json, asked, critic_at, serving
from trainer.posttrain.constitutional.stages import (
    SFT,
    cai,
    done,
    metrics,
    rows,
    stage,
)
from trainer.posttrain.constitutional.synthetic import (
    TRAINED,
    helpful,
    prompt,
)


def prefers_no_swearing(body: Json) -> Any:
    """Thinks, then chooses; where both are as good it likes the first one."""
    text = asked(body)
    if not text.endswith("The better answer is:"):
        return " The one without ugh."
    first, second = ("ugh" in text.partition(f"({letter}) ")[2].partition("\n")[0] for letter in "AB")
    likes_first = first <= second
    return (("A", -0.01), ("B", -5.0)) if likes_first else (("A", -5.0), ("B", -0.01))


@pytest.fixture(scope="module")
def pairs(base: Base, taught: ArtifactRef, tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    folder = tmp_path_factory.mktemp("pairs")
    with serving(prefers_no_swearing) as server:
        prompts = [{"prompt": prompt(pair)} for pair in TRAINED]
        made = cai(
            base,
            folder,
            inputs={"model": taught},
            prompts=prompts,
            critic=critic_at(server),
            write="preferences",
            promptsAtOnce=80,
            maxFailedShare=0.2,
        )
        return done(made, folder)


def test_a_label_after_a_chain_of_thought_is_clamped_and_the_order_of_answers_says_nothing(pairs: ArtifactRef) -> None:
    kept = [row for row in rows(pairs) if "left_out" not in row]
    assert len(kept) > 40
    for row in kept:
        assert [look["swapped"] for look in row["comparisons"]] == [False, True]
        assert all(look["thoughts"] == " The one without ugh." for look in row["comparisons"])
        assert row["probability"] in (0.4, 0.6)
        assert "ugh" in row["answers"][1 - row["chosen"]] and "ugh" not in row["answers"][row["chosen"]]
        assert (row["before"], row["after"]) == ({"no-swearing": True}, {"no-swearing": False})
    assert {row["chosen"] for row in kept} == {0, 1}
    equal = [row for row in rows(pairs) if row.get("left_out", {}).get("reason") in ("equal", "tie")]
    assert metrics(pairs)["tied"] == len(equal) > 0
    (one, *_) = rows(pairs, "records.jsonl")
    assert set(one) == {"prompt", "chosen", "rejected"}


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_pairs_are_read_by_the_stages_that_learn_from_them(
    base: Base, taught: ArtifactRef, pairs: ArtifactRef, tmp_path: Path, kind: str
) -> None:
    block: Json = SFT | {
        "from": {"model": "taught", "records": "cai"},
        "data": {"validation": {"fraction": 0.2}},
        "epochs": 3,
        "schedule": {"learningRate": 1e-3},
    }
    ref = done(stage(base, tmp_path, kind, {kind: block}, model=taught, records=pairs), tmp_path)
    found = metrics(ref)
    assert found["recordsIn"] < len(rows(pairs, "records.jsonl"))
    assert found["accuracy"] > 0.9
    report = json.loads((Path(ref.uri) / "data.json").read_text())
    assert [source["source"] for source in report["sources"]] == [f"{kind}.from.records"]


def test_a_model_may_compare_its_own_answers(base: Base, taught: ArtifactRef, tmp_path: Path) -> None:
    preferences = {"judgement": "direct", "orders": "drawn", "labels": "drawn"}
    made = cai(
        base, tmp_path, inputs={"model": taught}, write="preferences", preferences=preferences, maxFailedShare=0.2
    )
    ref = done(made, tmp_path)
    kept = [row for row in rows(ref) if "left_out" not in row]
    assert kept and all(len(row["comparisons"]) == 1 for row in kept)
    assert {row["comparisons"][0]["swapped"] for row in kept} == {False, True}
    assert any(not 0.4 <= row["probability"] <= 0.6 for row in kept), "log-probabilities as they are"


def test_revisions_are_read_beside_other_sources(base: Base, taught: ArtifactRef, tmp_path: Path) -> None:
    records = done(cai(base, tmp_path, inputs={"model": taught}, maxFailedShare=0.2), tmp_path)
    data = write_records(tmp_path / "helpful.jsonl", helpful(TRAINED[:10]))
    block: Json = SFT | {
        "from": {"model": "taught", "records": "cai"},
        "data": {"sources": [{"uri": str(data)}], "recordsWeight": 2},
    }
    made = stage(base, tmp_path, "sft", {"sft": block}, model=taught, records=records)
    ref = done(made, tmp_path)
    report = json.loads((Path(ref.uri) / "data.json").read_text())
    assert [source["train"] for source in report["sources"]] == [10, len(rows(records, "records.jsonl"))]
    assert history(made)
