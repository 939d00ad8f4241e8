"""Answers before and after a stage: the same prompts, greedily, on a page for people and as figures."""

import json
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from headrace_api.contract import ResolvedStage
from headrace_trainer.formats.samples import Answer, Page, Sample, write_samples
from trainer.engine.gangs import DP2, PP2, TP1, TP2, gang
from trainer.posttrain.chain import Base, further, pairs_block, pretrained, stage_rank, trained, write_records
from trainer.posttrain.test_dpo import pairs
from trainer.posttrain.test_losses_of_dpo import labelled
from trainer.posttrain.test_rl import rl

COLOURS = ("red", "blue", "green", "white", "black")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"), steps=10)


def asked(colour: str, *, right: str = "blue") -> dict[str, Any]:
    question = {"role": "user", "content": f"Colour of {colour} paint?"}
    return {"messages": [question, {"role": "assistant", "content": right}]}


def sft(base: Base, folder: Path, layout: dict[str, int] = TP1, *, attempt: int = 1, **fields: Any) -> ResolvedStage:
    """Every question has the answer "blue"; of the held-out ones, one wants another."""
    data = write_records(folder / "chat.jsonl", [asked(colour) for colour in COLOURS] * 40)
    held_out = [asked("yellow"), asked("grey", right="grey"), asked("pink"), asked("yellow"), asked("red")]
    block = {
        "from": {"model": "base"},
        "data": {
            "sources": [{"uri": str(data)}],
            "validation": {"uri": str(write_records(folder / "held-out.jsonl", held_out))},
        },
        "sequenceLength": 64,
        "globalBatchSize": 4,
        "microBatchSize": 2,
        "packing": False,
        "precision": "fp32",
        "schedule": {"learningRate": 1e-2, "decay": "constant"},
        "checkpoint": {"every": 5},
        "samples": {"maxNewTokens": 8},
    } | fields
    return further(base, folder, {"sft": block}, layout, name="sft", attempt=attempt)


def page(folder: Path, name: str = "sft") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"storage/{name}/samples.json").read_text())
    return found


def figures(folder: Path, name: str = "sft") -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / f"storage/{name}/artifact.json").read_text())["metrics"]
    return found


@pytest.fixture(scope="module")
def undisturbed(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    trained(sft(base, folder), folder)
    return folder


def test_held_out_answers_are_held_against_the_wanted_ones(undisturbed: Path) -> None:
    assert figures(undisturbed)["exactMatch"] == 3 / 4, "one question was asked twice, and one wants another answer"
    assert figures(undisturbed)["exactMatchBefore"] == 0
    found = page(undisturbed)
    assert (found["kind"], found["held_out"], found["max_tokens"]) == ("sft", True, 8)
    assert [s["wanted"] for s in found["samples"]] == ["blue", "grey", "blue", "blue"]
    assert [s["after"]["text"] for s in found["samples"]] == ["blue"] * 4
    assert [s["after"]["is_right"] for s in found["samples"]] == [True, False, True, True]
    assert all(not s["before"]["is_right"] for s in found["samples"])
    assert "Colour of yellow paint?" in found["samples"][0]["prompt"]
    text = (undisturbed / "storage/sft/samples.md").read_text()
    assert "Exactly the wanted answer: 0 of 4 before, 3 of 4 after." in text
    assert "After ✘" in text and "After ✔" in text


@pytest.mark.parametrize("layout", [TP2, PP2, DP2], ids=["TP2", "PP2", "DP2"])
def test_the_layout_changes_no_answer(base: Base, tmp_path: Path, undisturbed: Path, layout: dict[str, int]) -> None:
    trained(sft(base, tmp_path, layout), tmp_path)
    assert page(tmp_path) == page(undisturbed)


def test_asking_changes_no_loss(base: Base, tmp_path: Path, undisturbed: Path) -> None:
    records = trained(sft(base, tmp_path, samples={"count": 0}), tmp_path)
    path = undisturbed / "storage/sft/history.jsonl"
    assert [r["loss_hex"] for r in records] == [json.loads(line)["loss_hex"] for line in path.read_text().splitlines()]
    assert not list((tmp_path / "storage/sft").glob("samples*"))
    assert "exactMatch" not in figures(tmp_path)


@pytest.mark.parametrize("loses", [False, True], ids=["kept in storage", "lost"])
def test_a_killed_stage_shows_what_the_model_said_before_all_of_it(
    base: Base, tmp_path: Path, undisturbed: Path, loses: bool
) -> None:
    (killed,) = gang(stage_rank, 1, sft(base, tmp_path), tmp_path, 12)
    assert killed.exit_code == -signal.SIGKILL
    (before,) = (tmp_path / "storage/sft/samples").iterdir()
    if loses:
        before.unlink()
    trained(sft(base, tmp_path, attempt=2), tmp_path)
    assert page(tmp_path) == page(undisturbed)


def test_as_many_are_asked_as_wanted_and_adapters_answer_too(base: Base, tmp_path: Path) -> None:
    fields = {"adapter": {"lora": {"rank": 16}}, "samples": {"count": 2, "maxNewTokens": 8}}
    trained(sft(base, tmp_path, **fields, epochs=2), tmp_path)
    assert [s["after"]["text"] for s in page(tmp_path)["samples"]] == ["blue", "blue"]


def test_plain_text_asks_nothing(base: Base, tmp_path: Path) -> None:
    rows = [{"text": f"The {colour} paint is dry."} for colour in COLOURS] * 4
    data = {"sources": [{"uri": str(write_records(tmp_path / "text.jsonl", rows))}]}
    trained(sft(base, tmp_path, data=data), tmp_path)
    assert not list((tmp_path / "storage/sft").glob("samples*"))


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_dpo_shows_the_preferred_answer_beside_both(base: Base, tmp_path: Path, loss: str) -> None:
    records = labelled(60) if loss == "kto" else pairs(60)
    block = pairs_block(write_records(tmp_path / "records.jsonl", records), loss=loss, samples={"count": 3})
    trained(further(base, tmp_path, {"dpo": block}, TP1, name="dpo"), tmp_path)
    found = page(tmp_path, "dpo")
    assert (found["kind"], found["held_out"], len(found["samples"])) == ("dpo", True, 3)
    for sample in found["samples"]:
        worse, better = sample["prompt"].rpartition("? ")[0].split(" or ")
        better = better.strip()
        assert sample["wanted"] in (f"the {better}", None), worse
        assert loss == "kto" or sample["wanted"] is not None


def test_rl_shows_prompts_without_a_wanted_answer(base: Base, tmp_path: Path) -> None:
    stage = rl(base, tmp_path, epochs=1, samples={"count": 5, "maxNewTokens": 4})
    trained(stage, tmp_path)
    found = page(tmp_path, "rl")
    assert (found["held_out"], len(found["samples"])) == (False, 5)
    assert all(s["wanted"] is None and s["after"]["is_right"] is None for s in found["samples"])
    assert "exactMatch" not in figures(tmp_path, "rl")


class Cells(HTMLParser):
    """The text of a page's cells; fails on what it loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {name for name, _ in attrs}
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def test_no_answer_can_break_out_of_the_page(tmp_path: Path) -> None:
    nasty = "</pre><script>alert('x')</script> & ```\n# Heading"
    given = Answer(text=nasty, ended=False, is_right=False)
    sample = Sample(prompt=nasty, wanted=nasty, before=given, after=Answer(text="fine", ended=True, is_right=True))
    write_samples(Page(kind="sft", samples=[sample], held_out=True, max_tokens=4), tmp_path)
    cells = Cells()
    cells.feed((tmp_path / "samples.html").read_text())
    assert "script" not in cells.tags
    assert [cell.strip() for cell in cells.cells[:5]] == ["1", nasty, nasty, nasty, "fine"]
    assert f"````text\n{nasty}\n````" in (tmp_path / "samples.md").read_text()
    assert json.loads((tmp_path / "samples.json").read_text())["samples"][0]["prompt"] == nasty
