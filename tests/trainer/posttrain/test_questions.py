"""Exact match of held-out questions: before and after fine-tuning, and what a record or a requirement can do wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from headrace_api.artifact import ArtifactRef
from headrace_trainer.engine.answers import Answered
from trainer.engine.gangs import gang
from trainer.posttrain.chain import Base, pretrained, reference, resolved, stage_rank, write_records
from trainer.posttrain.test_sft import block

COLOURS = ("red", "blue", "green", "white", "black")


def questions(*, right: str = "blue") -> list[dict[str, Any]]:
    """Five questions; fine-tuning teaches one answer to all of them."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Colour of {colour} paint?"}],
            "completion": [{"role": "assistant", "content": right}],
        }
        for colour in COLOURS
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"), steps=10)


@pytest.fixture(scope="module")
def tuned(base: Base, tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    """A model that has learned to answer "blue" to everything."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = [{"messages": row["prompt"] + row["completion"]} for row in questions() * 40]
    fields: dict[str, Any] = {"schedule": {"learningRate": 1e-2}, "packing": False, "epochs": 1}
    config = block(write_records(folder / "chat.jsonl", rows), **fields)
    del config["data"]["validation"]
    stage = resolved(base.storage, "sft", {"sft": config}, inputs={"model": base.model})
    (ended,) = gang(stage_rank, 1, stage, folder)
    assert not ended.error, ended
    return reference(stage, ended)


def evaluated(base: Base, model: ArtifactRef, folder: Path, *, ranks: int = 1, **fields: Any) -> Any:
    """How an evaluation on questions ended."""
    config = {"from": {"model": "sft", "shards": "shards"}, "maxTokens": 500, **fields}
    inputs = {"model": model, "shards": base.shards}
    storage = base.storage
    stage = resolved(storage, "eval", {"evaluate": config}, inputs=inputs, ranks=ranks)
    ended = gang(stage_rank, ranks, stage, folder)
    return ended[0], Path(stage.output_uri)


def sets(folder: Path, **rights: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "uri": str(write_records(folder / f"{name}.jsonl", questions(right=right))), "maxTokens": 12}
        for name, right in rights.items()
    ]


def test_a_base_model_answers_none_and_a_tuned_one_all_and_the_report_shows_it(
    base: Base, tuned: ArtifactRef, tmp_path: Path
) -> None:
    before, _ = evaluated(base, base.model, tmp_path / "a", exactMatch=sets(tmp_path, blue="blue"))
    assert before.value.metrics["exactMatch/blue"] == 0, before
    ended, folder = evaluated(base, tuned, tmp_path / "b", exactMatch=sets(tmp_path, blue="blue", red="red"))
    assert (ended.value.metrics["exactMatch/blue"], ended.value.metrics["exactMatch/red"]) == (1, 0)
    report = json.loads((folder / "report.json").read_text())
    assert [a["said"] for a in report["answers"]["exactMatch/red"]] == ["blue"] * 5
    text = (folder / "report.md").read_text()
    assert "exactMatch/blue: 5 of 5 answered right (100.0%)" in text
    assert "Colour of green paint?" in text
    assert "loss_curve" not in text
    assert not (folder / "loss_curve.png").exists(), "its history is not of text"


def test_two_ranks_answer_as_one_does(base: Base, tuned: ArtifactRef, tmp_path: Path) -> None:
    ended, _ = evaluated(base, tuned, tmp_path, ranks=2, exactMatch=sets(tmp_path, blue="blue"))
    assert ended.value.metrics["exactMatch/blue"] == 1, ended


def test_what_is_required_is_held_against_the_answers(base: Base, tuned: ArtifactRef, tmp_path: Path) -> None:
    ended, _ = evaluated(
        base, tuned, tmp_path, exactMatch=sets(tmp_path, red="red"), require={"exactMatch/red": ">=0.9"}
    )
    assert ended.error == "UserError"
    assert ended.message.startswith("evaluate.require.exactMatch/red: 0 is not >=0.9")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "word " * 400, "completion": "x"}, "q.jsonl:1: the prompt is longer than the model's context"),
        ({"prompt": "x"}, "prompt, completion"),
        ({"prompt": "x", "completion": ""}, "'completion' is empty"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(
    base: Base, tuned: ArtifactRef, tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    path = write_records(tmp_path / "q.jsonl", [row])
    ended, _ = evaluated(base, tuned, tmp_path, exactMatch=[{"name": "q", "uri": str(path)}])
    assert ended.error == "UserError"
    assert said in ended.message


@pytest.mark.parametrize(
    ("said", "ended", "is_right"),
    [
        ("blue", True, True),
        (" blue\n", True, True),
        ("Blue", True, False),
        ("blue", False, False),
        ("blue.", True, False),
    ],
)
def test_an_answer_is_right_word_for_word(said: str, ended: bool, is_right: bool) -> None:
    assert Answered(question="?", right="blue", said=said, ended=ended).is_right is is_right
