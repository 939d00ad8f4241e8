"""Every command: output formats, and unexpected manifests and run folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from builders import START, make_run, manifest
from headrace_api.contract import ResolvedStage
from headrace_api.faults import Outcome
from headrace_api.run import Condition, ConditionType, RunStatus, StageState, StageStatus
from headrace_cli.attempts import Started
from headrace_cli.home import RunFolder, run_folder

HEADRACE = Path(sys.executable).parent / "headrace"


@pytest.fixture
def written(headrace, tmp_path) -> Path:
    """``run.yaml``, valid and short."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(manifest("corpus", "tok")))
    return path


@pytest.fixture
def folder(headrace, written, tmp_path) -> RunFolder:
    """A run of two stages whose first one has failed, long ago: no process of it lives."""
    run, folder = make_run("corpus", "tok"), run_folder(tmp_path / "home", "demo")
    attempt = folder.attempts / "corpus-1"
    attempt.mkdir(parents=True)
    folder.save_manifest(run, file=written)
    message = "/raw: no such folder"
    conditions = [
        Condition(
            type=c, status="True" if c is ConditionType.FAILED else "False", reason="x", last_transition_time=START
        )
        for c in ConditionType
    ]
    stage = StageStatus(
        name="corpus",
        state=StageState.FAILED,
        attempt=1,
        hash="h",
        reason="UserError",
        message=message,
        active_seconds=61,
    )
    stages = [stage, StageStatus(name="tok")]
    status = RunStatus(summary="Failed", stage="corpus", stages=stages, conditions=conditions)
    folder.save_status(status, durable=False)
    resolved = ResolvedStage(
        run="demo",
        stage=run.spec.stages[0],
        attempt=1,
        seed=1,
        hash="h",
        storage=run.spec.storage,
        output_uri="/store/corpus",
    )
    (attempt / "stage.json").write_text(resolved.model_dump_json(by_alias=True))
    (attempt / "processes.json").write_text(Started(pids={0: 2**22 + 1}, hash="h", digest="d").model_dump_json())
    (attempt / "outcome-0.json").write_text(
        Outcome(fault="user", reason="UserError", message=message).model_dump_json()
    )
    (attempt / "agent-0.log").write_text("no such folder\n")
    return folder


READERS = [
    ("status", "demo"), ("status", "demo", "-o", "json"), ("status", "demo", "-o", "yaml"), ("ls",), ("logs", "demo"),
    ("logs", "demo", "-f"), ("ask", "demo", "Hello"), ("plan", "run.yaml"), ("stop", "demo"),
]  # fmt: skip


def test_the_version(headrace):
    done = headrace("--version")
    assert done.code == 0
    assert done.out.split()[0] == "headrace"
    assert done.out.split()[1][0].isdigit()


def test_formats_are_what_they_are_called(headrace, folder):
    for words in (("status", "demo"), ("plan", "run.yaml"), ("ls",)):
        as_json, as_yaml = headrace(*words, "-o", "json").out, headrace(*words, "-o", "yaml").out
        with pytest.raises(ValueError):
            json.loads(as_yaml)
        assert yaml.safe_load(as_yaml) == json.loads(as_json)
        bad = headrace(*words, "-o", "xml")
        assert bad.code == 2
        assert "xml" in bad.err
        assert bad.out == ""


def test_ls_lists_runs_with_the_newest_first(headrace, folder, tmp_path):
    other = run_folder(tmp_path / "home", "second")
    shutil.copytree(folder.path, other.path)
    os.utime(folder.path / "manifest.yaml", (1, 1))
    (other.path / "status.json").write_text("")
    rows = json.loads(headrace("ls", "-o", "json").out)
    assert [(r["name"], r["state"], r["stage"]) for r in rows] == [
        ("second", "Damaged", ""),
        ("demo", "Failed", "corpus"),
    ]
    assert rows[1]["begunAt"] == "1970-01-01T00:00:01+00:00"
    said = headrace("ls").out
    assert said.index("second") < said.index("demo")


def test_ls_of_an_empty_home_says_how_to_begin(headrace):
    done = headrace("ls")
    assert done.code == 0
    assert "headrace run FILE" in done.err


@pytest.mark.parametrize("words", ["status", "logs", "stop", "ask", "names"])
@pytest.mark.parametrize("name", ["nobody", "..", "../runs/demo", "a/b", ""])
def test_names_that_no_run_has(headrace, folder, words, name):
    done = headrace(words, name, *(["Hello"] if words == "ask" else []))
    assert done.code == 2
    assert words == "names" or f"{name}: no such run" in done.err


DAMAGE = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00garbage\x9c"),
    "another type": lambda path: path.write_text("[1, 2]"),
    "deep": lambda path: path.write_text("[" * 2_000),
    "removed": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
RECORDS = ["manifest.yaml", "status.json", "lock", *(f"attempts/corpus-1/{name}" for name in (
    "stage.json", "processes.json", "outcome-0.json", "progress.json", "agent-0.log"))]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("record", RECORDS)
def test_a_damaged_run_folder_is_an_error_or_none_and_never_a_traceback(headrace, folder, record, damage):
    path = folder.path / record
    path.touch()
    DAMAGE[damage](path)
    for words in READERS:
        done = headrace(*words)
        assert done.code in (0, 1, 2), words
        assert done.code == 0 or len(done.err.splitlines()) == 1, f"{words}: {done.err}"
        assert "bug in headrace" not in done.err
        if damage != "a folder":
            assert "pydantic" not in done.err


def test_a_status_that_was_emptied_is_named(headrace, folder):
    (folder.path / "status.json").write_bytes(b"")
    done = headrace("status", "demo")
    assert done.code == 1
    assert f"{folder.path}/status.json: damaged" in done.err
    assert "Damaged" in headrace("ls").out


def test_a_run_that_a_newer_version_wrote_is_shown(headrace, folder):
    """Fields and kinds that this version does not know."""
    path = folder.path / "status.json"
    status = json.loads(path.read_text())
    status |= {"goodput": 0.97, "nodes": {"suspect": []}}
    status["stages"][0] |= {"lastFault": {"class": "stall"}}
    path.write_text(json.dumps(status))
    path = folder.path / "manifest.yaml"
    run = yaml.safe_load(path.read_text())
    run["spec"] |= {"objectives": {"minGoodput": 0.97}}
    run["spec"]["stages"][1] = {"name": "tok", "distil": {"from": {"model": "big"}}}
    path.write_text(yaml.safe_dump(run))
    done = headrace("status", "demo")
    assert done.code == 0
    for said in ("Failed", "corpus", "distil", "1m1s"):
        assert said in done.out
    assert json.loads(headrace("status", "demo", "-o", "json").out)["summary"] == "Failed"
    assert headrace("logs", "demo").out.endswith("no such folder\n")


def test_a_run_that_an_older_version_wrote_is_shown(headrace, folder):
    """Today's fields are missing."""
    (folder.path / "status.json").write_text('{"summary": "Failed", "stages": [{"name": "corpus", "state": "Failed"}]}')
    done = headrace("status", "demo")
    assert done.code == 0
    assert "Failed" in done.out


STRANGE = {
    "a list of lists without end": "[" * 2_000,
    "a date for a number": "kind: TrainingRun\nspec: {seed: 2024-13-45}\n",
    "a number of 5,000 digits": f"kind: TrainingRun\nspec: {{seed: {'9' * 5000}}}\n",
    "another kind": "kind: TrainingRum\nmetadata: {name: a}\n",
    "infinity": "kind: TrainingRun\nspec: {seed: .inf}\n",
    "no mapping": "- 1\n- 2\n",
    "nothing": "",
    "an alias to itself": "kind: TrainingRun\nspec: &a {stages: [*a]}\n",
    "a key that is a list": "kind: TrainingRun\n? [1, 2]\n: 3\n",
    "not text": "\x00\x01",
}


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_manifest_is_refused_with_exit_code_2(headrace, tmp_path, name, command):
    (tmp_path / "strange.yaml").write_text(STRANGE[name])
    done = headrace(command, "strange.yaml")
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert not (tmp_path / "home").exists()


def test_a_path_that_is_too_long_once_it_is_absolute_is_refused(headrace, written, tmp_path):
    value = yaml.safe_load(written.read_text())
    value["spec"]["stages"][0]["corpus"]["sources"] = [{"uri": "x/" * 505}]
    written.write_text(yaml.safe_dump(value))
    assert headrace("validate", "run.yaml").code == 0
    done = headrace("run", "run.yaml")
    assert done.code == 2
    assert "spec.stages[0].corpus.sources[0].uri" in done.err


@pytest.mark.parametrize("command", [("run", "run.yaml"), ("plan", "run.yaml"), ("ls",), ("status", "demo")])
def test_a_home_that_is_a_file(headrace, written, tmp_path, command):
    (tmp_path / "home").write_text("")
    done = headrace(*command)
    assert done.code == 2
    assert "home" in done.err
    assert len(done.err.splitlines()) == 1


def test_plan_leaves_nothing_behind(headrace, written, tmp_path):
    assert headrace("plan", "run.yaml").code == 0
    assert not (tmp_path / "home").exists()


def test_ctrl_c_while_modules_are_loaded_prints_no_traceback():
    program = (
        "import os, signal, sys\n"
        "class Impatient:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'headrace_cli.main': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Impatient())\n"
        "from headrace_cli.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_output_that_nobody_reads_any_more_is_no_error(folder):
    environment = os.environ | {"HEADRACE_HOME": str(folder.path.parents[1])}
    done = subprocess.run(
        ["sh", "-c", f"{HEADRACE} logs demo | head -c 1"], env=environment, capture_output=True, text=True
    )
    assert done.stderr == ""


def test_completion_offers_commands_and_runs(folder):
    environment = os.environ | {"HEADRACE_HOME": str(folder.path.parents[1]), "_HEADRACE_COMPLETE": "complete_bash"}

    def offered(words: str) -> list[str]:
        ask = environment | {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
        return subprocess.run([HEADRACE], env=ask, capture_output=True, text=True).stdout.split()

    assert {"status", "stop"} <= set(offered("headrace st"))
    assert offered("headrace status d") == ["demo"]
    script = subprocess.run(["bash", "-c", f"{HEADRACE} --show-completion; true"], capture_output=True, text=True)
    assert "complete -o default -F _headrace_completion headrace" in script.stdout
