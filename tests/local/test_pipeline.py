"""The whole way on one machine: raw text to a served model, and what people see of it."""

import json
import shutil
from pathlib import Path

import pytest

from workplace import STAGES, Workplace


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
    first = headrace("ask", "small", "The function", "--max-tokens", "12")
    assert first.code == 0, first.err
    assert first.out.startswith("The function")
    assert len(first.out.rstrip("\n")) > len("The function")
    assert headrace("ask", "small", "The function", "--max-tokens", "12").out == first.out


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
    assert {r["stage"]: r["action"] for r in rows} == {n: "run" if n == "serve" else "skip" for n in STAGES}
    base = next(r for r in rows if r["stage"] == "base")
    assert base["parameters"] == headrace.stage("base")["metrics"]["parameters"]
    assert base["steps"] == 40


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
    import subprocess

    from workplace import HEADRACE

    made = subprocess.run([HEADRACE, "init", "new.yaml"], cwd=headrace.folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert headrace("validate", "new.yaml").code == 0
    again = subprocess.run([HEADRACE, "init", "new.yaml"], cwd=headrace.folder, capture_output=True, text=True)
    assert again.returncode == 2
    assert "new.yaml: exists; name another file" in again.stderr
