"""The whole pipeline on one machine: raw text to a served model, and what users see of it."""

import http.server
import json
import shutil
import subprocess
import threading
import urllib.request
from pathlib import Path

import pytest

from workplace import HEADRACE, STAGES, Workplace


@pytest.fixture(scope="module")
def headrace(tmp_path_factory):
    """A home in which a run of every stage kind is complete; its server is up."""
    workplace = Workplace(tmp_path_factory.mktemp("pipeline"))
    workplace.write_text()
    workplace.manifest(*STAGES)
    done = workplace("run", "run.yaml")
    assert done.code == 0, done.err
    workplace.first = done
    yield workplace
    assert workplace("stop", "small").code == 0
    left = workplace.processes()
    for process in left:
        process.kill()
    assert left == [], "the server outlived `headrace stop`"


def test_the_run_is_complete_and_its_table_shows_every_stage(headrace):
    assert headrace.status()["summary"] == "Complete"
    for name, stage in STAGES.items():
        kind = next(k for k in stage if k != "compute")
        assert name in headrace.first.out
        assert kind in headrace.first.out
    evaluation = headrace.stage("eval")["metrics"]
    assert f"{evaluation['perplexity']:.2f}" in headrace.first.out
    assert f"{evaluation['unigramPerplexity']:.2f}" in headrace.first.out


def test_progress_was_told_while_it_ran(headrace):
    assert "tokens/s" in headrace.first.err
    assert "loss" in headrace.first.err
    assert "ETA" in headrace.first.err


def test_the_paths_that_the_end_names_are_there(headrace):
    words = headrace.first.out.split()
    picture = next(w for w in words if w.endswith("loss_curve.png"))
    assert Path(picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (headrace.artifact("ship") / "model.safetensors").exists()
    assert str(headrace.artifact("ship")) in headrace.first.out


def test_the_served_model_answers_over_http(headrace):
    endpoint = headrace.status()["endpoint"]
    body = {"model": "small/ship", "prompt": "The function", "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(
        f"{endpoint}/v1/completions", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        text = json.load(answer)["choices"][0]["text"]
    done = headrace("ask", "small", "The function", "--max-tokens", "12")
    assert (done.code, done.out) == (0, f"The function{text}\n"), done.err


def test_a_base_model_is_not_chatted_with_and_the_remedy_is_named(headrace):
    done = headrace("chat", "small", "Hello")
    assert (done.code, done.out) == (2, "")
    assert "small/ship has no chat template" in done.err
    assert "`headrace ask small PROMPT`, or add an sft stage" in done.err


def test_a_second_run_starts_nothing(headrace):
    attempts = [s["attempt"] for s in headrace.status()["stages"]]
    done = headrace("run", "run.yaml")
    assert done.code == 0
    assert [s["attempt"] for s in headrace.status()["stages"]] == attempts


def test_status_is_the_object_that_a_custom_resource_would_hold(headrace):
    said = json.loads(headrace("status", "small", "-o", "json").out)
    assert said == headrace.status()
    assert [c["type"] for c in said["conditions"] if c["status"] == "True"] == ["Complete"]
    assert "Succeeded" in headrace("status", "small").out


def test_plan_says_what_a_run_would_do(headrace):
    rows = json.loads(headrace("plan", "run.yaml", "-o", "json").out)
    assert {r["stage"]: r["action"] for r in rows} == {n: "keep" if n == "serve" else "skip" for n in STAGES}
    base = next(r for r in rows if r["stage"] == "base")
    assert base["parameters"] == headrace.stage("base")["metrics"]["parameters"]
    assert base["steps"] == 40


class _Other(http.server.BaseHTTPRequestHandler):
    """Answers as the server of another run would."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "other/ship"}], "choices": [{"text": "x"}]}).encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


def _other_server(port):
    try:
        return http.server.HTTPServer(("127.0.0.1", port), _Other)
    except OSError:
        return None


def test_ask_reaches_this_runs_server_wherever_it_is_and_no_other(headrace):
    """Its server dies, another one takes the port, and the next server of this run gets another port."""
    before = headrace.status()["endpoint"]
    for process in headrace.processes():
        process.kill()
    headrace.wait_for(lambda: headrace.processes() == [])
    # The engine ends with its agent, but not in the same moment.
    other = headrace.wait_for(lambda: _other_server(int(before.rpartition(":")[2])))
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        dead = headrace("ask", "small", "The function")
        assert dead.code == 1
        assert f"no server is running; start it with headrace run {headrace.folder / 'run.yaml'}" in dead.err
        seen = json.loads(headrace("status", "small", "-o", "json").out)
        assert (seen["summary"], seen.get("endpoint")) == ("Interrupted", None)
        headrace.manifest(*STAGES, restartPolicy={"maxInfraRestarts": 1})
        assert headrace("run", "run.yaml").code == 0
        after = headrace.status()["endpoint"]
        assert after != before
        alive = headrace("ask", "small", "The function", "--max-tokens", "4")
        assert (alive.code, alive.err) == (0, "")
    finally:
        other.shutdown()
        other.server_close()


def test_stop_clears_what_was_served(headrace):
    assert "stopped serve" in headrace("stop", "small").out
    status = headrace.status()
    assert (status["summary"], status.get("endpoint")) == ("Suspended", None)
    assert [s.get("endpoint") for s in status["stages"]] == [None] * len(STAGES)
    assert headrace.processes() == []
    assert "start it with headrace run" in headrace("ask", "small", "The function").err
    rows = json.loads(headrace("plan", "run.yaml", "-o", "json").out)
    assert [r["stage"] for r in rows if r["action"] == "run"] == ["serve"]


def test_logs_show_what_a_stage_wrote(headrace):
    done = headrace("logs", "small", "--stage", "eval")
    assert "==> eval-1" in done.out
    assert "unigram" in done.out
    wrong = headrace("logs", "small", "--stage", "evil")
    assert wrong.code == 2
    assert "no such stage" in wrong.err


def test_a_run_that_was_forgotten_finds_its_results_in_storage(headrace):
    """Another home, the same storage: what is there and verifies is not made again."""
    stored = str(headrace.artifact("corpus").parent)
    path = headrace.manifest("corpus", "tok", storage={"uri": stored})
    shutil.move(headrace.home / "runs/small", headrace.home / "runs/kept")
    try:
        path = headrace.manifest("corpus", "tok", storage={"uri": stored.replace("runs/small", "runs/kept")})
        done = headrace("run", str(path))
        assert done.code == 0, done.err
        assert "made at" in done.err or "AlreadyDone" in headrace("logs", "small").out
    finally:
        shutil.rmtree(headrace.home / "runs/small")
        shutil.move(headrace.home / "runs/kept", headrace.home / "runs/small")


def test_an_edited_stage_runs_again_and_the_ones_before_it_do_not(headrace):
    headrace.manifest("corpus", "tok", edit=lambda s: s["tok"]["tokenizer"].update(vocabSize=400))
    assert headrace("run", "run.yaml").code == 0
    assert headrace.stage("corpus")["attempt"] == 1
    assert headrace.stage("tok")["attempt"] == 2
    assert headrace.stage("tok")["metrics"]["vocabSize"] == 400


def test_init_writes_a_manifest_that_is_valid(headrace):
    done = headrace("validate", str(headrace.folder / "run.yaml"))
    assert done.code == 0
    made = subprocess.run([HEADRACE, "init", "new.yaml"], cwd=headrace.folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert headrace("validate", "new.yaml").code == 0
    again = subprocess.run([HEADRACE, "init", "new.yaml"], cwd=headrace.folder, capture_output=True, text=True)
    assert again.returncode == 2
    assert "new.yaml: already exists; name another file" in again.stderr
