"""Answers that are criticized and revised: records, transcripts, pages, and that training on them works."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace_api.artifact import ArtifactRef
from trainer.posttrain.chain import Base, write_records
from trainer.posttrain.constitutional.critics import Json, asked, serving
from trainer.posttrain.constitutional.stages import (
    PROMPTS,
    SFT,
    cai,
    done,
    metrics,
    rows,
    stage,
)
from trainer.posttrain.constitutional.synthetic import (
    HELD_OUT,
    MEND,
    REPEAT,
    TRAINED,
    helpful,
    is_useful,
    prompt,
)


def test_an_answer_is_criticized_and_revised_by_principles_that_are_drawn(
    base: Base, taught: ArtifactRef, tmp_path: Path
) -> None:
    constitution = {"version": "2", "principles": [MEND, REPEAT]}
    ref = done(
        cai(base, tmp_path, inputs={"model": taught}, constitution=constitution, passes=2, maxFailedShare=0.2), tmp_path
    )
    transcripts = rows(ref)
    assert [row["number"] for row in transcripts] == list(range(len(PROMPTS)))
    kept = [row for row in transcripts if "left_out" not in row]
    for row in kept:
        assert sorted(step["principle"] for step in row["passes"]) == ["no-swearing", "nothing"]
        assert all(step["critique"] and step["revision"] for step in row["passes"])
        assert row["before"]["no-swearing"] == ("ugh" in row["answers"][0])
        assert row["after"]["no-swearing"] == ("ugh" in row["passes"][-1]["revision"])
    assert len({row["passes"][0]["principle"] for row in kept}) == 2
    assert rows(ref, "records.jsonl") == [
        {"prompt": row["prompt"], "completion": row["passes"][-1]["revision"]} for row in kept
    ]
    found = metrics(ref)
    assert (found["promptsIn"], found["recordsOut"]) == (len(transcripts), len(kept))
    swearing = sum("ugh" in row["answers"][0] for row in kept) / len(kept)
    assert found["violations/no-swearing/before"] == pytest.approx(swearing)
    assert found["violationsAfter"] < found["violationsBefore"]
    said = json.loads((Path(ref.uri) / "constitution.json").read_text())
    assert (said["version"], [p["name"] for p in said["principles"]]) == ("2", ["no-swearing", "nothing"])


def test_samples_can_be_read_on_a_page(base: Base, taught: ArtifactRef, tmp_path: Path) -> None:
    prompts = [{"prompt": "<script>a b:"}, *({"prompt": prompt(pair)} for pair in PROMPTS)]
    ref = done(cai(base, tmp_path, inputs={"model": taught}, prompts=prompts, maxFailedShare=0.5), tmp_path)
    page, text = ((Path(ref.uri) / name).read_text() for name in ("samples.html", "samples.md"))
    for heading in ("Critique 1, by no-swearing", "Before (violates no-swearing)", "After"):
        assert heading in page and heading in text
    assert "<script>" not in page and "http" not in page.replace("<!doctype html>", "")
    assert (Path(ref.uri) / "violations.png").stat().st_size > 1000
    assert json.loads((Path(ref.uri) / "report.json").read_text())["violations"]["no-swearing"]["before"]["judged"]


@pytest.mark.slow
def test_the_log_of_a_rank_shows_samples_and_what_they_come_to(base: Base, taught: ArtifactRef, tmp_path: Path) -> None:
    """What ``headrace logs`` prints is what a rank's process writes."""
    made = cai(base, tmp_path, inputs={"model": taught}, maxFailedShare=0.2)
    (tmp_path / "stage.json").write_text(made.model_dump_json(by_alias=True))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"HEADRACE_SCRATCH": str(tmp_path / "scratch"), "MASTER_ADDR": "127.0.0.1"}
    env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "headrace_trainer.stage", str(tmp_path / "stage.json")]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    for line in ("Critique 1, by no-swearing: ", "After: ", "violations of no-swearing: before "):
        assert line in ended.stderr


def test_what_the_critic_alone_can_judge_is_counted_by_its_yes_and_no(
    base: Base, taught: ArtifactRef, tmp_path: Path
) -> None:
    by_critic = {name: value for name, value in MEND.items() if name != "rule"} | {"name": "judged"}
    requests: list[str] = []

    def reply(body: Json) -> Any:
        requests.append(asked(body))
        if "Yes or No" not in asked(body):
            return " yes"
        answer = asked(body).partition(":")[2].partition("\n")[0]
        return (("Yes", -0.1), ("No", -3.0)) if "ugh" in answer else (("Yes", -3.0), ("No", -0.1))

    with serving(reply) as server:
        made = cai(
            base,
            tmp_path,
            inputs={"model": taught},
            constitution={"version": "1", "principles": [by_critic]},
            critic={"endpoint": {"url": server.url, "model": "judge"}},
            maxFailedShare=0.2,
        )
        ref = done(made, tmp_path)
    kept = [row for row in rows(ref) if "left_out" not in row]
    assert [row["before"]["judged"] for row in kept] == ["ugh" in row["answers"][0] for row in kept]
    assert [row["after"]["judged"] for row in kept] == ["ugh" in row["passes"][0]["revision"] for row in kept]
    assert 0 < metrics(ref)["violations/judged/before"] < 1
    assert {r["model"] for r in server.requests} == {"judge"}


@pytest.mark.slow
def test_violations_are_halved_and_help_is_kept_where_the_constitution_asks_for_something(
    base: Base, taught: ArtifactRef, tmp_path: Path
) -> None:
    """On held-out prompts, beside a constitution that asks for nothing. Helpfulness data is mixed in for both."""
    before = measured(base, tmp_path / "before", taught)
    assert before["swears"] > 0.3 and before["helps"] > 0.8, before
    after = {
        name: measured(base, tmp_path / name, aligned(base, tmp_path / name, taught, principle))
        for name, principle in (("mend", MEND), ("repeat", REPEAT))
    }
    print(before, after)
    assert after["mend"]["swears"] <= before["swears"] / 2
    assert after["mend"]["helps"] >= 0.95 * before["helps"]
    assert after["repeat"]["swears"] > 0.75 * before["swears"], "no gain without something to mend"


def aligned(base: Base, folder: Path, taught: ArtifactRef, principle: Json) -> ArtifactRef:
    """The model after sft on its own revisions."""
    prompts = [{"prompt": prompt(pair)} for pair in TRAINED]
    made = cai(
        base,
        folder,
        inputs={"model": taught},
        prompts=prompts,
        constitution={"version": "1", "principles": [principle]},
        critic={"temperature": 0.0},
        promptsAtOnce=80,
        maxFailedShare=0.2,
    )
    records = done(made, folder)
    print({name: value for name, value in metrics(records).items() if "iolat" in name or "changed" in name})
    data = write_records(folder / "helpful.jsonl", helpful(TRAINED))
    block: Json = SFT | {
        "from": {"model": "taught", "records": "cai"},
        "data": {"sources": [{"uri": str(data), "weight": 0.5}], "recordsWeight": 2},
        "epochs": 4,
        "schedule": {"learningRate": 1e-3, "warmup": 2},
    }
    return done(stage(base, folder, "aligned", {"sft": block}, model=taught, records=records), folder)


def measured(base: Base, folder: Path, model: ArtifactRef) -> dict[str, float]:
    """Shares of the answers to held-out prompts that swear, and that help; sampled at temperature 1."""
    prompts = [{"prompt": prompt(pair)} for pair in HELD_OUT]
    source = {"sources": [{"uri": str(write_records(folder / "held-out.jsonl", prompts)), "weight": 3}]}
    made = cai(base, folder, inputs={"model": model}, data=source, name="measured", promptsAtOnce=240, maxFailedShare=1)
    found = [row for row in rows(done(made, folder)) if row.get("answers")]
    assert len(found) > 0.9 * 3 * len(HELD_OUT)
    swears = sum("ugh" in row["answers"][0] for row in found) / len(found)
    return {"swears": swears, "helps": sum(is_useful(row, row["answers"][0]) for row in found) / len(found)}
