"""From raw text to an assistant on one machine: demonstrations, preferences, export, server, chat."""

import subprocess
import sys
from pathlib import Path

import openai
import pytest

from workplace import STAGES, Terminal, Workplace

TASKS = Path(__file__).resolve().parents[2] / "scripts" / "assistant_tasks.py"
_TRAINING = {"globalBatchSize": 8, "microBatchSize": 4, "precision": "fp32", "sequenceLength": 64}
AFTER_BASE = {
    "sft": {
        "sft": {
            "from": {"model": "base"},
            "data": {"sources": [{"uri": "tasks/sft.jsonl"}], "validation": {"fraction": 0.1}},
            "schedule": {"learningRate": 1e-2},
            **_TRAINING,
        }
    },
    "aligned": {
        "dpo": {
            "from": {"model": "sft"},
            "data": {"sources": [{"uri": "tasks/pairs.jsonl"}], "validation": {"fraction": 0.2}},
            "schedule": {"learningRate": 1e-3},
            **_TRAINING,
            "sequenceLength": 128,  # both sides of a pair
        }
    },
    "ship": {"export": {"from": {"model": "aligned"}}},
}
QUESTION = "Sort 3 1 2"


@pytest.fixture(scope="module")
def headrace(tmp_path_factory):
    """A home in which the run is complete; its server is up."""
    workplace = Workplace(tmp_path_factory.mktemp("assistant"))
    workplace.write_text()
    made = workplace.folder / "made"
    subprocess.run([sys.executable, TASKS, made], check=True, capture_output=True)
    (workplace.folder / "tasks").mkdir()
    for name, count in (("sft", 200), ("pairs", 80)):
        lines = (made / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (workplace.folder / "tasks" / f"{name}.jsonl").write_text("".join(lines[:count]))
    before = ("corpus", "tok", "tokens", "base")
    workplace.manifest(*before, stages=AFTER_BASE | {"serve": STAGES["serve"]}, edit=_shorten)
    done = workplace("run", "run.yaml")
    assert done.code == 0, done.err
    workplace.first = done
    yield workplace
    assert workplace("stop", "small").code == 0
    left = workplace.processes()
    for process in left:
        process.kill()
    assert left == [], "the server outlived `headrace stop`"


def _shorten(stages):
    stages["base"]["pretrain"]["tokens"] = 10 * 8 * 32


def test_the_table_shows_what_matters_of_each_stage(headrace):
    for name, figures in (("sft", ("loss", "validationLoss")), ("aligned", ("loss", "validationLoss", "margin"))):
        metrics = headrace.stage(name)["metrics"]
        for figure in figures:
            assert f"{metrics[figure]:.4f}"[:5] in headrace.first.out, (name, figure)
    assert f"{headrace.stage('aligned')['metrics']['accuracy']:.1%}" in headrace.first.out
    assert "records" in headrace.first.out


@pytest.mark.parametrize("stage", ["base", "sft", "aligned"])
def test_each_training_stage_leaves_a_picture_of_its_history(headrace, stage):
    picture = headrace.artifact(stage) / "history.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert str(picture) in headrace.first.out


def test_the_openai_client_and_chat_hear_the_same_answer(headrace):
    client = openai.OpenAI(base_url=f"{headrace.status()['endpoint']}/v1", api_key="none")
    asked = {
        "model": "small/ship",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == whole
    done = headrace("chat", "small", QUESTION, "--max-tokens", "12", "--temperature", "0")
    assert (done.code, done.out) == (0, f"{_printed(whole)}\n"), done.err


def test_a_question_may_come_through_a_pipe(headrace):
    words = headrace.command("chat", "small", "--max-tokens", "12", "--temperature", "0")
    piped = subprocess.run(words, input=QUESTION, capture_output=True, text=True, cwd=headrace.folder, env=headrace.env)
    direct = headrace("chat", "small", QUESTION, "--max-tokens", "12", "--temperature", "0")
    assert (piped.returncode, piped.stdout) == (0, direct.out)


def test_two_turns_on_a_terminal(headrace):
    words = headrace.command("chat", "small", "--max-tokens", "6", "--temperature", "0")
    terminal = Terminal(*words, workplace=headrace)
    for turn in range(1, 3):
        terminal.wait_for("> ", times=turn)
        terminal.type(f"{QUESTION}\n")
    terminal.wait_for("> ", times=3)
    terminal.type("\x04")
    code, shown = terminal.finish()
    assert code == 0, shown
    assert "error" not in shown


def _printed(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
