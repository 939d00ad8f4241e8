"""Constitutional AI, whole: prompts and principles in, records that make a model break them less out."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace_api.artifact import ARTIFACT_FILE, ArtifactRef
from headrace_api.contract import ResolvedStage
from trainer.engine.gangs import DP2, PP2, TP1, TP2, Ended, gang
from trainer.posttrain.chain import Base, history, pretrained, reference, resolved, stage_rank, write_records
from trainer.posttrain.critics import Json, Trouble, asked, serving
from trainer.posttrain.synthetic import HELD_OUT, MEND, REPEAT, TRAINED, demonstrations, helpful, is_useful, prompt

PROMPTS = TRAINED[:40]
SFT: Json = {
    "sequenceLength": 128,
    "globalBatchSize": 8,
    "microBatchSize": 4,
    "precision": "fp32",
    "checkpoint": {"every": 1000},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def taught(base: Base, tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    """A model that answers, swears half of the time, and can say and mend that."""
    folder = tmp_path_factory.mktemp("taught")
    data = write_records(folder / "demonstrations.jsonl", demonstrations(2400))
    block: Json = SFT | {
        "from": {"model": "base"},
        "data": {"sources": [{"uri": str(data)}]},
        "epochs": 4,
        "schedule": {"learningRate": 4e-3, "warmup": 20},
    }
    return done(stage(base, folder, "taught", {"sft": block}, model=base.model), folder)


def stage(
    base: Base,
    folder: Path,
    name: str,
    block: Json,
    layout: dict[str, int] = TP1,
    *,
    attempt: int = 1,
    **inputs: ArtifactRef,
) -> ResolvedStage:
    """A stage in a storage of its own."""
    ((kind, fields),) = block.items()
    axes = {"tensor": layout["tensor"], "pipeline": layout["pipeline"]}
    return resolved(
        base.storage.model_copy(update={"uri": str(folder / "storage")}),
        name,
        {kind: {"parallelism": axes, **fields}},
        inputs=inputs,
        attempt=attempt,
        ranks=layout["tensor"] * layout["pipeline"] * layout["data"],
    )


def cai(
    base: Base,
    folder: Path,
    layout: dict[str, int] = TP1,
    *,
    prompts: Any = None,
    attempt: int = 1,
    name: str = "cai",
    inputs: dict[str, ArtifactRef],
    **fields: Any,
) -> ResolvedStage:
    """A constitutional stage."""
    asked = [{"prompt": prompt(pair)} for pair in PROMPTS] if prompts is None else prompts
    # The report names the file, so what is compared reads the same one.
    data = write_records((Path(base.storage.uri) if prompts is None else folder) / f"{name}.jsonl", asked)
    block: Json = {
        "from": {slot: slot for slot in inputs},
        "data": {"sources": [{"uri": str(data)}]},
        "constitution": {"version": "1", "principles": [MEND]},
        "maxNewTokens": 8,
        "critic": {"maxNewTokens": 8} | fields.pop("critic", {}),
        "sequenceLength": 128,
        "precision": "fp32",
        "promptsAtOnce": 10,
    } | fields
    return stage(base, folder, name, {"constitutional": block}, layout, attempt=attempt, **inputs)


def rank_in_trouble(rank: int, world: int, made: ResolvedStage, folder: Path, trouble: Json) -> Any:
    """One rank of the stage. ``die_at``: the last rank is killed once so many prompts are done; ``die_keeping``: the first
    rank, before it stores so manieth unit of this attempt; ``stop_at``: it is asked to stop once so many are done."""
    from headrace_trainer import board
    from headrace_trainer.stages.constitutional.units import KeptUnits

    counter = board.Counter()
    board.beat_on(counter)
    keep, kept = KeptUnits.keep, [0]

    def keep_or_die(self: Any, *args: Any) -> None:
        kept[0] += 1
        if kept[0] == trouble.get("die_keeping"):
            os.kill(os.getpid(), signal.SIGKILL)
        keep(self, *args)
        (folder / f"kept-{made.attempt}").write_text(str(kept[0]))
        if kept[0] == trouble.get("stop_at"):
            (folder / f"scratch-{made.stage.name}-{made.attempt}" / "stop").touch()

    KeptUnits.keep = keep_or_die  # type: ignore[method-assign]
    outcome = stage_rank(rank, world, made, folder, trouble.get("die_at"))
    (folder / f"beats-{rank}").write_text(str(counter.beats))
    return outcome


def run(made: ResolvedStage, folder: Path, **trouble: Any) -> list[Ended]:
    return gang(rank_in_trouble, made.stage.compute.world, made, folder, trouble)


def done(made: ResolvedStage, folder: Path, **trouble: Any) -> ArtifactRef:
    """Run a stage to its end; its artifact."""
    ended = run(made, folder, **trouble)
    assert not any(e.error for e in ended), ended
    return reference(made, ended[0])


def failed(made: ResolvedStage, folder: Path) -> str:
    """Why a stage failed, as its user is told."""
    ended = run(made, folder)
    assert {e.error for e in ended} == {"UserError"}, ended
    return ended[0].message


def rows(ref: ArtifactRef, file: str = "transcripts.jsonl") -> list[Json]:
    return [json.loads(line) for line in (Path(ref.uri) / file).read_text().splitlines()]


def metrics(ref: ArtifactRef) -> dict[str, float]:
    found: dict[str, float] = json.loads((Path(ref.uri) / ARTIFACT_FILE).read_text())["metrics"]
    return found


def digests(ref: ArtifactRef) -> dict[str, str]:
    """The content of every file."""
    files = json.loads((Path(ref.uri) / ARTIFACT_FILE).read_text())["files"]
    return {file["path"]: file["sha256"] for file in files}


# What is left -----------------------------------------------------------------------------------------------------


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


# It works ---------------------------------------------------------------------------------------------------------


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


# Exactness and recovery -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(base: Base, taught: ArtifactRef, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return digests(done(cai(base, folder, inputs={"model": taught}, maxFailedShare=0.2), folder))


GREEDY: Json = {"temperature": 0, "critic": {"temperature": 0}, "maxFailedShare": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("write", ["revisions", "preferences"])
def test_the_artifact_does_not_depend_on_the_layout(
    base: Base, taught: ArtifactRef, tmp_path: Path, write: str
) -> None:
    """Greedy answers would be equal pairs, so pairs are sampled."""
    fields = GREEDY if write == "revisions" else {"write": write, "maxFailedShare": 0.5, "critic": {"temperature": 0}}
    found = {
        name: digests(done(cai(base, tmp_path / name, layout, inputs={"model": taught}, **fields), tmp_path / name))
        for name, layout in {"one": TP1, "TP2": TP2, "PP2": PP2, "DP2": DP2}.items()
    }
    for name, files in found.items():
        assert files == found["one"], name


def test_a_killed_stage_leaves_the_same_bytes_and_repeats_one_unit_at_most(
    base: Base, taught: ArtifactRef, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    seed = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(10**6)))
    print(f"HEADRACE_TEST_SEED={seed}")
    draw = random.Random(seed)

    def attempt(number: int) -> ResolvedStage:
        return cai(base, tmp_path, inputs={"model": taught}, attempt=number, maxFailedShare=0.2)

    (killed,) = run(attempt(1), tmp_path, die_at=10 * draw.choice([1, 2]))
    assert killed.exit_code == -signal.SIGKILL
    done_before = int((tmp_path / "kept-1").read_text())
    (killed,) = run(attempt(2), tmp_path, die_keeping=1)
    assert killed.exit_code == -signal.SIGKILL
    ref = done(attempt(3), tmp_path)
    assert digests(ref) == undisturbed
    assert int((tmp_path / "kept-3").read_text()) == len(PROMPTS) // 10 - done_before
    assert not list((tmp_path / "storage/cai").glob("units/**/*.jsonl")), "the artifact replaces them"


def test_a_stage_that_is_asked_to_stop_keeps_what_is_finished(
    base: Base, taught: ArtifactRef, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    made = cai(base, tmp_path, inputs={"model": taught}, maxFailedShare=0.2)
    (stopped,) = run(made, tmp_path, stop_at=2)
    assert stopped.error == "Stopped"
    ref = done(made.model_copy(update={"attempt": 2}), tmp_path)
    assert digests(ref) == undisturbed
    assert int((tmp_path / "kept-2").read_text()) == len(PROMPTS) // 10 - 2


def test_a_damaged_unit_is_made_again(tmp_path: Path) -> None:
    from headrace_trainer.stages.constitutional.units import KeptUnits, spans
    from headrace_trainer.storage import DirectoryStore

    units = spans(5, size=2)
    assert [len(unit) for unit in units] == [2, 2, 1]
    kept = KeptUnits(DirectoryStore(tmp_path), stage="cai", identity="a" * 64)
    for unit in units:
        kept.keep(unit, [{"number": n} for n in range(unit.first, unit.end)])
    assert [row["number"] for row in kept.rows(units)] == [0, 1, 2, 3, 4]
    first, second, _ = sorted(tmp_path.rglob("*.jsonl"))
    first.write_bytes(first.read_bytes()[:-3])
    second.write_bytes(second.read_bytes().replace(b"2", b"7"))
    assert [unit for unit, _ in kept.found(units)] == [units[2]]
    assert not list(KeptUnits(DirectoryStore(tmp_path), stage="cai", identity="b" * 64).found(units))


# Critics ----------------------------------------------------------------------------------------------------------


def critic_at(server: Any, **fields: Any) -> Json:
    return {"endpoint": {"url": server.url, "model": "judge", "timeout": "1s", "retries": 3, **fields}}


def says_yes(body: Json) -> str:
    return " yes" if "ugh" in asked(body).partition("\n")[0] else " no"


@pytest.mark.slow
def test_an_endpoint_that_stumbles_changes_nothing(
    base: Base, taught: ArtifactRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors, silences and lost connections are repeated; the token is sent, and is nowhere in what the stage leaves. Ranks
    that wait are seen to be alive, those that ask nobody too."""
    monkeypatch.setenv("CRITIC_TOKEN", "sesame-9231")
    found, beats = {}, {}
    rough = Trouble(errors=3, silences=2, cuts=2)
    for name, trouble, layout in (("smooth", Trouble(), TP1), ("rough", rough, DP2), ("shared", Trouble(), TP2)):
        trouble.token = "sesame-9231"
        with serving(says_yes, trouble) as server:
            critic = critic_at(server, tokenVariable="CRITIC_TOKEN")
            made = cai(
                base,
                tmp_path / name,
                layout,
                inputs={"model": taught},
                critic=critic,
                maxFailedShare=0.2,
                promptsAtOnce=20,
            )
            found[name] = digests(done(made, tmp_path / name))
            beats[name] = [int((tmp_path / name / f"beats-{r}").read_text()) for r in range(made.stage.compute.world)]
            if name == "rough":
                assert server.answered["500"] == 3
    assert found["smooth"] == found["rough"] == found["shared"]
    assert min(n for of_ranks in beats.values() for n in of_ranks) > 2 * 20, beats
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sesame-9231" not in path.read_bytes(), path


@pytest.mark.parametrize("layout", [TP1, DP2, TP2], ids=["TP1", "DP2", "TP2"])
def test_a_wrong_token_ends_the_stage_at_once_and_is_not_shown(
    base: Base, taught: ArtifactRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, int]
) -> None:
    monkeypatch.setenv("CRITIC_TOKEN", "wrong-5512")
    with serving(says_yes, Trouble(token="right")) as server:
        critic = critic_at(server, tokenVariable="CRITIC_TOKEN")
        message = failed(cai(base, tmp_path, layout, inputs={"model": taught}, critic=critic), tmp_path)
        assert len(server.requests) <= 2 * 8
    assert "critic.endpoint.tokenVariable: CRITIC_TOKEN: the server answers 401: put a token" in message
    assert "wrong-5512" not in message


def test_a_token_that_is_not_there_is_told_before_anything_is_loaded(
    base: Base, taught: ArtifactRef, tmp_path: Path
) -> None:
    critic = {"endpoint": {"url": "http://127.0.0.1:9/v1", "model": "judge", "tokenVariable": "NO_SUCH_TOKEN"}}
    message = failed(cai(base, tmp_path, inputs={"model": taught}, critic=critic), tmp_path)
    assert "tokenVariable: NO_SUCH_TOKEN: is not set here" in message


def test_a_stage_that_waits_for_a_critic_stops_when_it_is_asked_to(
    base: Base, taught: ArtifactRef, tmp_path: Path
) -> None:
    answered = threading.Event()

    def never(body: Json) -> str:
        (tmp_path / "scratch-cai-1" / "stop").touch()
        answered.wait(250)
        return " no"

    with serving(never) as server:
        critic = critic_at(server, timeout="200s")
        ended = run(cai(base, tmp_path, DP2, inputs={"model": taught}, critic=critic), tmp_path)
        assert not answered.is_set()
        answered.set()
    assert {e.error for e in ended} == {"Stopped"}, ended


RUBBISH = [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"[" * 100_000]


def test_rubbish_is_left_out_and_counted_and_too_much_of_it_ends_the_stage(
    base: Base, taught: ArtifactRef, tmp_path: Path
) -> None:
    calls: Iterator[int] = iter(range(10**6))

    def now_and_then(body: Json) -> Any:
        call = next(calls)
        return RUBBISH[call % len(RUBBISH)] if call % 8 == 3 else says_yes(body)

    with serving(now_and_then) as server:
        made = cai(base, tmp_path, inputs={"model": taught}, critic=critic_at(server, atOnce=1), maxFailedShare=0.5)
        ref = done(made, tmp_path)
    left_out = [row["left_out"] for row in rows(ref) if row.get("left_out", {}).get("step") == "critique"]
    assert {found["reason"] for found in left_out} == {"rubbish"}
    assert len(left_out) == 5
    assert metrics(ref)["failed"] >= 5
    assert len(rows(ref, "records.jsonl")) == len(PROMPTS) - metrics(ref)["failed"]

    with serving(lambda body: b"<html>") as server:
        made = cai(base, tmp_path / "all", inputs={"model": taught}, critic=critic_at(server), maxFailedShare=0.1)
        message = failed(made, tmp_path / "all")
        assert len(server.requests) <= 10, "the first unit says it all"
    assert message.startswith("constitutional.maxFailedShare: 0.1: 10 of 40 prompts gave no record: rubbish 10;")
    assert "choose a critic that answers what is asked" in message


def test_a_server_that_is_gone_fails_by_its_field_and_is_asked_again_by_the_next_attempt(
    base: Base, taught: ArtifactRef, tmp_path: Path
) -> None:
    with serving(says_yes) as server:
        critic = critic_at(server, retries=1)
    made = cai(base, tmp_path, inputs={"model": taught}, critic=critic, maxFailedShare=0.2)
    message = failed(made, tmp_path)
    assert "endpoint 10" in message and "see to critic.endpoint" in message
    assert not list((tmp_path / "storage").rglob("units/**/*.jsonl")), "what failed for want of a server is not kept"


def test_another_artifact_criticizes_and_revises_with_its_own_tokenizer(
    base: Base, taught: ArtifactRef, tmp_path: Path
) -> None:
    """The base model knows neither the task nor an end; the model that was taught does."""
    made = cai(
        base,
        tmp_path,
        inputs={"model": base.model, "critic": taught},
        critic={"revisions": "critic", "temperature": 0},
        temperature=0.5,
        maxFailedShare=0.9,
    )
    kept = [row for row in rows(done(made, tmp_path)) if "left_out" not in row]
    assert len(kept) > 10
    assert sum(row["passes"][0]["critique"] in (" yes", " no", " it") for row in kept) > 0.8 * len(kept)


def test_conversations_stay_conversations(base: Base, taught: ArtifactRef, tmp_path: Path) -> None:
    turns = [
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{a} or {b}?"}]}
        for a, b in PROMPTS[:6]
    ]

    def reply(body: Json) -> str:
        roles = [turn["role"] for turn in body["messages"]]
        assert roles[:3] == ["system", "user", "assistant"], roles
        return "It is rude." if asked(body) == MEND["critiqueRequest"] else "A polite answer."

    with serving(reply) as server:
        critic = critic_at(server) | {"revisions": "critic"}
        ref = done(cai(base, tmp_path, inputs={"model": taught}, prompts=turns, critic=critic), tmp_path)
    (kept, *_) = rows(ref, "records.jsonl")
    assert kept["prompt"] in [turn["prompt"] for turn in turns]
    assert kept["completion"] == [{"role": "assistant", "content": "A polite answer."}]
    assert rows(ref)[0]["passes"][0]["critique"] == "It is rude."


TURN_BY_TURN = (
    "{% for turn in messages %}{% if turn['role'] == 'assistant' %}{% generation %}{{ turn['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ turn['content'] + '\\n' }}{% endif %}{% endfor %}"
)
"""A template that needs no tokens of its own."""


def choosing_rank(rank: int, world: int, folder: Path, tokenizer: Path, layout: dict[str, int]) -> list[Any]:
    """What a model says to choices, in turns and in plain text, one too long, and one with a control token."""
    from headrace_api.parallelism import Layout
    from headrace_trainer.engine.model.loading import load_model
    from headrace_trainer.engine.parallel import join_gang
    from headrace_trainer.formats.chat.tokens import load
    from headrace_trainer.formats.model_card import read_card
    from headrace_trainer.stages.constitutional.asking import Ask
    from headrace_trainer.stages.constitutional.speakers import ModelSpeaker

    card = read_card(folder)
    with join_gang(Layout(**layout), rank=rank, local_rank=rank, local_world=world, seed=1) as ranks:
        model: Any = load_model(card, folder, ranks)
        stops = frozenset([card.eod_id])
        speaker = ModelSpeaker(model, tokenizer=tokenizer, stop_tokens=stops, length=64, seed=1, gang=ranks)
        turns = [
            {"role": "user", "content": "Which?"},
            {"role": "assistant", "content": "Hm."},
            {"role": "user", "content": "A or B?"},
        ]
        control = [{"role": "user", "content": load(tokenizer).eos_token}]
        asks = [
            Ask(id="turns", text=turns, options=("A", "B")),
            Ask(id="turned", text=turns, options=("B", "A")),
            Ask(id="plain", text="The keeper of the", options=(" lighthouse", " fog")),
            Ask(id="long", text="a " * 200, options=(" a", " b")),
            Ask(id="control", text=control, options=("A", "B")),
        ]
        return speaker.choose(asks)


def test_a_model_gives_two_replies_probabilities_that_add_up_under_any_layout(base: Base, tmp_path: Path) -> None:
    from headrace_trainer.formats.chat import with_chat_template

    folder, tokenizer = Path(base.model.uri), tmp_path / "tokenizer"
    tokenizer.mkdir()
    with_chat_template(folder / "tokenizer", tokenizer, template=TURN_BY_TURN)
    found = {}
    for name, layout in {"one": TP1, "TP2": TP2, "PP2": PP2}.items():
        for ended in gang(choosing_rank, layout["tensor"] * layout["pipeline"], folder, tokenizer, layout):
            assert not ended.error, ended
            turns, turned, plain, too_long, control = ended.value
            assert turns + turned == pytest.approx(1, abs=1e-6)
            assert 0 < turns < 1 and 0 < plain < 1
            assert too_long.reason == "tooLong" and control.reason == "template"
            found[name] = (turns, plain)
    for name, probabilities in found.items():
        assert probabilities == pytest.approx(found["one"], abs=1e-5), name


# Preferences ------------------------------------------------------------------------------------------------------


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
