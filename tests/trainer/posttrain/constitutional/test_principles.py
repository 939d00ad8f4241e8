"""The parts of Constitutional AI that need no model: principles, labels, replies of servers, what is asked, and totals."""

import json
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace_api.run import Storage
from headrace_api.stages import Constitutional
from headrace_api.stages.constitutional import Constitution, ConstitutionFile, Endpoint, Labels, Preferences, Principle
from headrace_trainer.errors import UserError
from headrace_trainer.stages.constitutional import asking
from headrace_trainer.stages.constitutional.comparing import choose, label_of, uniform
from headrace_trainer.stages.constitutional.constitution import digest_of, drawn, read_constitution
from headrace_trainer.stages.constitutional.endpoint import Client, Reply, Unanswered, probability
from headrace_trainer.stages.constitutional.report import Samples, logged, markdown, page
from headrace_trainer.stages.constitutional.speakers import Manner
from headrace_trainer.stages.constitutional.totals import Totals
from trainer.posttrain.constitutional.critics import Trouble, serving
from trainer.posttrain.constitutional.synthetic import MEND

FOUR = ConstitutionFile.model_validate(
    {"version": "1", "principles": [MEND | {"name": name} for name in ("one", "two", "three", "four")]}
)
PRINCIPLE = Principle.model_validate(MEND)
ODD = MEND | {"rule": {"forbids": {"jsonSchema": {"schema": '{"type": "odd"}'}}}}


def test_a_principle_is_drawn_for_each_pass_and_none_twice_before_all_were() -> None:
    names = [[drawn(FOUR, seed=1, number=n, index=i).name for i in range(8)] for n in range(400)]
    for of_prompt in names:
        assert sorted(of_prompt[:4]) == sorted(p.name for p in FOUR.principles)
        assert of_prompt[4:] == of_prompt[:4]
    counts = Counter(of_prompt[0] for of_prompt in names)
    assert min(counts.values()) > 60, counts
    assert names[7] == [drawn(FOUR, seed=1, number=7, index=i).name for i in range(8)]
    assert names != [[drawn(FOUR, seed=2, number=n, index=i).name for i in range(8)] for n in range(400)]


def read(folder: Path, text: str, **fields: Any) -> ConstitutionFile:
    path = folder / "constitution.yaml"
    path.write_text(text)
    ctx: Any = SimpleNamespace(resolved=SimpleNamespace(storage=Storage(uri=str(folder))), scratch=folder)
    return read_constitution(ctx, Constitution(uri=str(path), **fields))


def test_a_file_is_read_as_yaml_or_json(tmp_path: Path) -> None:
    text = json.dumps({"version": "3", "principles": [MEND]})
    found = read(tmp_path, text, version="3")
    assert found.principles[0].rule is not None
    assert digest_of(found) == digest_of(read(tmp_path, f"version: '3'\nprinciples:\n- {json.dumps(MEND)}\n"))
    assert digest_of(found) != digest_of(read(tmp_path, text.replace("Leave", "Let")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds 0 documents: write one, with version and principles"),
        ("a: [", "correct the YAML there"),
        ("version: '1'", "principles: missing"),
        ("version: '1'\nprinciples: []", "principles: a list: list at least 1"),
        ("version: '1'\nprinciples: [{name: x}]", "principles[0].critiqueRequest: missing"),
        (f"version: '1'\nprinciples: [{json.dumps(MEND | {'rules': 1})}]", "unknown field; did you mean rule?"),
        (f"version: '1'\nprinciples: {json.dumps([MEND, MEND])}", "'no-swearing': is used twice"),
        (f"version: '1'\nprinciples: [{json.dumps(ODD)}]", "constitutional.constitution: no-swearing: jsonSchema: $.type: 'odd' is not valid"),
        (f"version: '2'\nprinciples: [{json.dumps(MEND)}]", "constitutional.constitution.version: '1': "),
    ],
)  # fmt: skip
def test_what_is_no_constitution_is_told_by_its_field(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, text, version="1")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("probabilities", "fields", "label"),
    [
        ([0.999], {}, 0.6),
        ([0.001], {}, 0.4),
        ([0.55], {}, 0.55),
        ([0.99, 0.01], {}, 0.5),
        ([0.9, 0.5], {}, 0.6),
        ([0.999], {"clamp": 0.9}, 0.9),
        ([0.999], {"judgement": "direct"}, 0.999),
        ([0.8, 0.4], {"judgement": "direct"}, 0.6),
    ],
)
def test_labels_are_clamped_after_a_chain_of_thought_only(
    probabilities: list[float], fields: dict[str, Any], label: float
) -> None:
    assert label_of(probabilities, Preferences.model_validate(fields)) == pytest.approx(label)


def test_a_drawn_label_follows_its_probability_and_an_even_one_chooses_nothing() -> None:
    assert [choose(label, Labels.LIKELIER, draw=0.99) for label in (0.6, 0.4, 0.5)] == [0, 1, None]
    drawn_ones = [choose(0.6, Labels.DRAWN, draw=uniform(f"{n}")) for n in range(4000)]
    assert drawn_ones.count(0) / 4000 == pytest.approx(0.6, abs=0.03)


def token(text: str, **top: float) -> dict[str, Any]:
    return {"token": text, "logprob": -0.1, "top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()]}


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("A", (), 1.0),
        ("The answer is B.", (), 0.0),
        ("(b)", (), 0.0),
        ("A", (token("A", A=-0.6931, B=-0.6931),), 0.5),
        ("B", (token(" ", A=-1), token("B", A=-1.0986, B=-0.4055)), 1 / 3),
        ("A", (token("A"),), 1.0),
    ],
)
def test_a_choice_is_read_from_log_probabilities_or_else_from_the_letter(
    text: str, tokens: tuple[Any, ...], expected: float
) -> None:
    assert probability(Reply(text=text, ended=True, tokens=tokens), (" A", " B")) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("text", ["", "both are fine", "A or B", "C"])
def test_a_reply_that_chooses_nothing_is_rubbish(text: str) -> None:
    with pytest.raises(Unanswered, match="asked for A or B"):
        probability(Reply(text=text, ended=True), ("A", "B"))


def client(url: str, **fields: Any) -> Client:
    config = Endpoint.model_validate({"url": url, "model": "judge", "timeout": "2s", "retries": 3} | fields)
    return Client(config, moved=lambda: None, cancelled=threading.Event())


TURN = [{"role": "user", "content": "A or B?"}]
BRIEF = Manner(max_new_tokens=4, temperature=0)


def test_a_server_without_log_probabilities_is_asked_without_them_and_not_twice_for_every_choice() -> None:
    with serving(lambda body: "B", Trouble(gives_log_probs=False)) as server:
        asking_it = client(server.url)
        assert [asking_it.choice(TURN, ("A", "B"), seed=1) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert ["logprobs" in request for request in server.requests] == [True, False, False, False]
    with serving(lambda body: (("A", -1.2), ("B", -0.3))) as server:
        assert client(server.url).choice(TURN, ("A", "B"), seed=1) == pytest.approx(0.289, abs=1e-3)


def test_a_server_that_wants_to_be_left_alone_is() -> None:
    with serving(lambda body: "yes", Trouble(errors=1, retry_after="2")) as server:
        began = time.monotonic()
        assert client(server.url).reply(TURN, seed=1, manner=BRIEF).text == "yes"
        assert time.monotonic() - began >= 2, "a lower bound holds on any machine"


def test_redirections_are_not_followed_and_tokens_stay_out_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRITIC_TOKEN", "sesame-9231")
    for trouble, said in ((Trouble(moved_to="http://127.0.0.1:9/"), "307"), (Trouble(token="another"), "401")):
        with (
            serving(lambda body: "yes", trouble) as server,
            pytest.raises(UserError, match=f"the server answers {said}") as refused,
        ):
            client(server.url, tokenVariable="CRITIC_TOKEN").reply(TURN, seed=1, manner=BRIEF)
        assert "sesame" not in str(refused.value)


def test_a_request_that_a_server_does_not_understand_is_not_repeated() -> None:
    with serving(lambda body: "yes", Trouble(refusals=9)) as server, pytest.raises(Unanswered, match="400: too many"):
        client(server.url).reply(TURN, seed=1, manner=BRIEF)
    assert len(server.requests) == 1


def test_a_plain_prompt_is_asked_about_in_plain_text_and_a_conversation_in_turns() -> None:
    assert asking.revision("Say a:", " ugh", " yes", PRINCIPLE) == (
        "Say a: ugh\n\nCritique request: Is there ugh?\n\nCritique: yes\n\nRevision request: Leave ugh out.\n\nRevision:"
    )
    turns: Any = [{"role": "user", "content": "Say a"}]
    roles = [turn["role"] for turn in asking.revision(turns, "ugh", "yes", PRINCIPLE)]  # type: ignore[index]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    choice: Any = asking.choice(turns, ("one", "two"), PRINCIPLE, thoughts="hm")
    assert [turn["role"] for turn in choice] == ["user", "assistant", "user"]
    assert "(A) one\n\n(B) two" in choice[0]["content"] and "user: Say a" in choice[0]["content"]


def row(number: int, *, before: str = " a ugh", after: str = " a", **fields: Any) -> dict[str, Any]:
    step = {"principle": "no-swearing", "critique": " yes\x1b[2J", "revision": after}
    verdicts = {"before": {"no-swearing": "ugh" in before}, "after": {"no-swearing": "ugh" in after}}
    return {"number": number, "prompt": "a b:", "answers": [before], "passes": [step], **verdicts} | fields


def left_out(number: int, reason: str) -> dict[str, Any]:
    return {"number": number, "prompt": "a b:", "left_out": {"reason": reason, "step": "critique", "detail": "why"}}


def totals(*found: dict[str, Any]) -> Totals:
    made = Totals()
    for one in found:
        made.add(one)
    return made


def test_only_failures_count_against_the_budget() -> None:
    config = Constitutional.model_construct(max_failed_share=0.25)
    good = [row(n) for n in range(6)]
    assert (
        totals(*good, left_out(6, "rubbish"), left_out(7, "tie"), left_out(8, "equal")).problem(config, total=9) is None
    )
    said = totals(*good, *(left_out(6 + n, "rubbish") for n in range(3))).problem(config, total=9)
    assert said is not None
    assert "3 of 9 prompts gave no record: rubbish 3; prompt 6, critique: why: choose a critic" in said
    early = totals(*(left_out(n, "unfinished") for n in range(3))).problem(config, total=9)
    assert early is not None and "raise maxNewTokens" in early, "it can only become worse"
    none = totals(left_out(0, "tie")).problem(config, total=1)
    assert none is not None and "raise temperature" in none


def test_figures_are_by_principle_and_before_and_after() -> None:
    found = totals(row(0), row(1), row(2, before=" a"), row(3, after=" a ugh"), left_out(4, "tie")).metrics()
    assert (found["violationsBefore"], found["violationsAfter"], found["changed"]) == (0.75, 0.25, 0.5)
    assert (found["violations/no-swearing/before"], found["violations/no-swearing/after"]) == (0.75, 0.25)
    assert (found["promptsIn"], found["recordsOut"], found["failed"], found["tied"]) == (5, 4, 0, 1)


def test_pages_and_logs_hold_what_models_write_and_are_not_moved_by_it() -> None:
    constitution = ConstitutionFile(version="1", principles=[PRINCIPLE])
    rows = [row(0, after="~~~~\n<b>&", prompt="<script>alert(1)</script>")]
    made = page(rows, totals(*rows), constitution)
    assert "<script>" not in made and "&lt;b&gt;&amp;" in made
    assert "~~~~~~~text\n~~~~\n<b>&\n~~~~~~~" in markdown(rows, totals(*rows), constitution)
    lines = list(logged(rows[0]))
    assert "prompt 0: Critique 1, by no-swearing:  yes\\u001b[2J" in lines
    assert all(line.isprintable() for line in lines)


def test_samples_are_from_all_over_the_prompts() -> None:
    samples = Samples(100)
    for number in range(100):
        samples.look(row(number) if number % 3 else left_out(number, "tie"))
    numbers = [found["number"] for found in samples.rows]
    assert len(numbers) == 10 and numbers[0] < 10 and numbers[-1] >= 90
