"""Whoever criticizes: a server that stumbles, lies or is gone, another artifact, the model itself."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace_api.artifact import ArtifactRef
from trainer.engine.gangs import DP2, PP2, TP1, TP2, gang
from trainer.posttrain.chain import Base
from trainer.posttrain.constitutional.critics import Json, Trouble, asked, critic_at, says_yes, serving
from trainer.posttrain.constitutional.stages import PROMPTS, cai, digests, done, failed, metrics, rows, run
from trainer.posttrain.constitutional.synthetic import MEND


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
