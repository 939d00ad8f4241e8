"""A deployment under the real agent: the answers are the model's, and no process outlives it."""

import json
import os
import signal
import socket
import urllib.request

import pytest

from headrace_api.contract import served_model_name
from headrace_api.faults import ExitCode, FaultClass
from headrace_cli.ask import ask
from headrace_cli.server import Server
from trainer.deploy.builders import ENGINE, FIRST_PORT, Deployment, command_line, gone

NUM_TOKENS = 24

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(exported, tmp_path_factory):
    """A server that has answered; its configured port was taken, and before its answer it was not ready."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        folder = tmp_path_factory.mktemp("server")
        # As in CI: a local run inside a pod is no part of the cluster around it.
        env = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
        deployment = Deployment(folder, exported.storage, exported.ref, port=taken, **env)
        deployment.taken_port = taken
        deployment.wait_for(deployment.engine)
        deployment.ready_at_start = deployment.ready()
        deployment.wait_for(deployment.serving)
        yield deployment
        deployment.end()


@pytest.fixture(scope="module")
def endpoint(server):
    return server.progress().endpoint


def in_process(folder, prompt: str) -> str:
    """What transformers says to ``prompt`` in this process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)[0]
    return tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", ["The import statement", "A class is", "x"])
def test_the_command_line_gets_the_models_greedy_continuation(exported, endpoint, prompt):
    expected = in_process(exported.files, prompt)
    assert len(expected) > 4
    # A character that the last token cuts in two is shown by transformers and held back by vLLM.
    server = Server(endpoint=endpoint, model=served_model_name("test", "ship"))
    assert ask(server, prompt, max_tokens=NUM_TOKENS).rstrip("\ufffd") == expected.rstrip("\ufffd")


def test_the_model_is_listed_by_the_names_of_run_and_stage(endpoint):
    with urllib.request.urlopen(f"{endpoint}/v1/models") as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["test/ship"]


def test_a_taken_port_is_passed_over(server, endpoint):
    assert endpoint.startswith("http://127.0.0.1:")
    assert int(endpoint.rpartition(":")[2]) > server.taken_port


def test_the_pod_is_ready_when_a_completion_was_answered_and_not_before(server):
    assert server.ready_at_start != 0
    assert server.ready() == 0


def test_serving_is_reported_again_and_again(server):
    first = server.progress()
    server.wait_for(lambda: server.progress().time > first.time, seconds=10)
    assert server.progress().phase == "Serving"
    assert server.progress().message == f"test/ship answers at {first.endpoint}"


def test_stopping_ends_every_process_and_is_no_failure(server):
    """The last test with this server."""
    processes = server.processes()
    assert server.engine() in processes
    server.agent.send_signal(signal.SIGTERM)
    assert server.agent.wait(30) == ExitCode.STOPPED
    assert server.outcome().fault is FaultClass.STOPPED
    assert gone(processes)
    assert server.ready() != 0


def test_a_killed_engine_fails_the_attempt_by_name(deploy):
    deployment = deploy(port=FIRST_PORT)
    deployment.wait_for(deployment.engine)
    engine = deployment.engine()
    engine.kill()
    assert deployment.agent.wait(30) == ExitCode.PROCESS
    outcome = deployment.outcome()
    assert (outcome.fault, outcome.reason) == (FaultClass.PROCESS, "EngineFailed")
    assert f"{ENGINE} serve (process {engine.pid}) was killed by SIGKILL" in outcome.message


def test_in_a_pod_it_listens_where_the_service_looks_and_dies_with_a_killed_agent(deploy):
    deployment = deploy(port=FIRST_PORT, reports=False, KUBERNETES_SERVICE_HOST="10.0.0.1")
    deployment.wait_for(deployment.engine)
    processes, words = deployment.processes(), command_line(deployment.engine())
    assert words[words.index("--host") :][:4] == ["--host", "0.0.0.0", "--port", str(FIRST_PORT)]
    os.kill(deployment.agent.pid, signal.SIGKILL)
    deployment.agent.wait()
    assert gone(processes)
