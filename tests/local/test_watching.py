"""A run on an 80-column terminal, and what other terminals show meanwhile."""

import json
import re
import signal
import subprocess

import pytest

from workplace import Terminal, Workplace


def on_terminal(workplace: Workplace, *words: str) -> Terminal:
    return Terminal(*workplace.command(*words), workplace=workplace)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of two stages on a terminal, which ``logs -f`` followed in another one from its beginning to its end."""
    workplace = Workplace(tmp_path_factory.mktemp("watched"))
    workplace.write_text()
    workplace.manifest("corpus", "tok")
    run = on_terminal(workplace, "run", "run.yaml")
    workplace.wait_for(lambda: workplace.stage("corpus").get("state") in ("Starting", "Running"))
    logs = workplace.start("logs", "small", "-f")
    workplace.code, workplace.shown = run.finish()
    try:
        workplace.followed = logs.communicate(timeout=60)
    finally:
        logs.kill()
    workplace.logs_code = logs.returncode
    yield workplace


def test_the_live_table_keeps_within_80_columns(watched):
    assert watched.code == 0, watched.shown
    events = re.compile(r"\d\d:\d\d:\d\d ")  # these the terminal wraps
    assert max(len(line) for line in watched.shown.splitlines() if not events.match(line)) <= 80
    assert "…" not in watched.shown
    for said in ("stage", "done", "loss", "tokens/s", "ETA", "time", "▶", "✔ Succeeded", "79 documents"):
        assert said in watched.shown


def test_status_on_a_terminal_loses_no_figure(watched):
    code, text = on_terminal(watched, "status", "small").finish()
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    documents = watched.stage("corpus")["metrics"]["documentsOut"]
    for figure in ("corpus", "tokenizer", "✔ Succeeded", "79 documents", f"{documents:.0f} documents", "k characters"):
        assert figure in text


def test_logs_followed_both_stages_and_ended_with_the_run(watched):
    out, err = watched.followed
    assert (watched.logs_code, err) == (0, "")
    assert out.count("==> corpus-1 agent-0 <==") == 1
    assert out.count("==> tok-1 agent-0 <==") == 1
    assert out.index("corpus-1") < out.index("tok-1")
    for stage in ("corpus", "tok"):
        log = (watched.home / f"runs/small/attempts/{stage}-1/agent-0.log").read_text()
        assert log.splitlines()[-1] in out


def test_logs_of_one_stage_end_with_that_stage(waiting):
    run = waiting.start()
    waiting.wait_for(lambda: len(waiting.agents()) == 1)
    logs = waiting.start("logs", "small", "-f", "--stage", "corpus")
    with pytest.raises(subprocess.TimeoutExpired):
        logs.wait(timeout=2)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    assert logs.wait(timeout=30) == 0


def test_plan_names_what_run_then_skips(watched):
    watched.manifest("corpus", "tok", edit=lambda s: s["tok"]["tokenizer"].update(vocabSize=400))
    before = [s["attempt"] for s in watched.status()["stages"]]
    rows = json.loads(watched("plan", "run.yaml", "-o", "json").out)
    assert [r["action"] for r in rows] == ["skip", "run"]
    assert watched("run", "run.yaml").code == 0
    after = [s["attempt"] for s in watched.status()["stages"]]
    assert [b != a for b, a in zip(before, after, strict=True)] == [False, True]
