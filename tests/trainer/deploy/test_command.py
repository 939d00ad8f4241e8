"""The engine's command line, address and model name, without starting it."""

import sys
from pathlib import Path

import pytest

from headrace_api.contract import served_model_name
from headrace_api.stages.deploy import Engine
from headrace_operator.body.build.service import cluster_service
from headrace_trainer.errors import UserError
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.deploy import run
from headrace_trainer.stages.deploy.command import Served, engine_command, engine_environment, find_program
from headrace_trainer.stages.deploy.place import cluster_place, local_place
from trainer.deploy.builders import FIRST_PORT, deploy_stage

POD = "--host 0.0.0.0 --port 8000"
LOCAL = "--host 127.0.0.1 --port 8001"
VLLM = "vllm serve files --served-model-name demo/ship --dtype bfloat16"


@pytest.mark.parametrize(
    ("engine", "num_gpus", "in_pod", "expected"),
    [
        (Engine.TRANSFORMERS, 0, False, f"transformers serve demo/ship {LOCAL} --device cpu"),
        (Engine.TRANSFORMERS, 0, True, f"transformers serve demo/ship {POD} --device cpu"),
        (Engine.TRANSFORMERS, 1, True, f"transformers serve demo/ship {POD} --device auto"),
        (Engine.VLLM, 0, False, f"{VLLM} {LOCAL} --tensor-parallel-size 1"),
        (Engine.VLLM, 1, True, f"{VLLM} {POD} --tensor-parallel-size 1"),
        (Engine.VLLM, 8, True, f"{VLLM} {POD} --tensor-parallel-size 8"),
    ],
)
def test_the_command_of_each_engine(exported, engine, num_gpus, in_pod, expected):
    resolved = deploy_stage(exported.storage, exported.ref)
    place = cluster_place(resolved, port=8000) if in_pod else local_place(8001)
    served = Served(name="demo/ship", folder=Path("files"), dtype="bfloat16", num_gpus=num_gpus)
    assert " ".join(engine_command(engine, engine.value, served, place)) == expected


def test_the_address_in_a_cluster_is_that_of_the_operators_service(exported):
    resolved = deploy_stage(exported.storage, exported.ref).model_copy(update={"namespace": "team-a"})
    place = cluster_place(resolved, port=FIRST_PORT)
    service = cluster_service(resolved)
    name, (port,) = service["metadata"]["name"], service["spec"]["ports"]
    assert place.endpoint == f"http://{name}.team-a.svc:{port['port']}"
    assert place.local == f"http://127.0.0.1:{FIRST_PORT}"


@pytest.mark.parametrize(
    ("run_name", "stage", "expected"), [("demo", "ship", "demo/ship"), ("a--b---c", "s-1", "a-b-c/s-1")]
)
def test_a_models_name_is_the_runs_and_the_stages(run_name, stage, expected):
    assert served_model_name(run_name, stage) == expected


def test_the_engine_asks_no_network_and_gets_no_credentials(tmp_path):
    inherited = {"PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "secret", "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": "/home/hub"}
    env = engine_environment(inherited, home=tmp_path)
    assert "AWS_SECRET_ACCESS_KEY" not in env
    assert env["PATH"] == "/bin"
    assert (env["HF_HUB_OFFLINE"], env["HF_HUB_DISABLE_UPDATE_CHECK"], env["VLLM_NO_USAGE_STATS"]) == ("1", "1", "1")
    assert Path(env["HF_HUB_CACHE"]).is_relative_to(tmp_path)


def test_transformers_is_found_beside_python_without_a_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(find_program(Engine.TRANSFORMERS)) == Path(sys.executable).parent / "transformers"


def test_an_engine_on_the_path_is_found(monkeypatch, tmp_path):
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "elsewhere" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program(Engine.VLLM) == str(program)


def test_a_missing_engine_is_the_users_to_mend(exported, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    resolved = deploy_stage(exported.storage, exported.ref, engine="vllm")
    with pytest.raises(UserError, match=r"^deploy\.engine: 'vllm' is not installed here; use a runtime"):
        run(StageContext(resolved=resolved, scratch=tmp_path / "scratch"))
