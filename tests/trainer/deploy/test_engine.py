"""Child processes, ports and answers, one at a time, with programs that start quickly."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest

from headrace_trainer.errors import UserError
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.deploy import stage as serve_stage
from headrace_trainer.stages.deploy.client import Refused, complete
from headrace_trainer.stages.deploy.engine import EngineFailed, EngineProcess
from headrace_trainer.stages.deploy.place import local_place
from headrace_trainer.stages.deploy.port import claimed_port
from trainer.deploy.builders import FIRST_PORT, deploy_stage, gone

IGNORE = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
WORKER = (
    "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print('worker', p.pid, flush=True); "
    "time.sleep(600)"
)


def start(program: str, tmp_path) -> EngineProcess:
    return EngineProcess([sys.executable, "-c", program], env=dict(os.environ), cwd=tmp_path)


def wait_until_dead(engine: EngineProcess) -> EngineFailed:
    for _ in range(200):
        try:
            engine.check()
        except EngineFailed as error:
            return error
        time.sleep(0.05)
    raise AssertionError("the engine did not end")


def wait_for_output(capfd, word: str) -> str:
    said = ""
    for _ in range(200):
        said += capfd.readouterr().err
        if word in said and said.endswith("\n"):
            return said
        time.sleep(0.05)
    raise AssertionError(f"{word!r} was not said, but {said!r}")


def test_an_engine_that_ends_is_named_with_its_code_and_last_words(tmp_path):
    engine = start("print('first'); print('no such device'); raise SystemExit(3)", tmp_path)
    message = str(wait_until_dead(engine))
    assert f"(process {engine.pid}) exited with code 3" in message
    assert message.endswith("first\nno such device")


def test_an_engine_that_is_killed_is_named_with_the_signal(tmp_path):
    engine = start("import time; time.sleep(600)", tmp_path)
    engine.check()
    os.kill(engine.pid, signal.SIGKILL)
    assert "was killed by SIGKILL; if nobody did that, it may have run out of memory" in str(wait_until_dead(engine))


def test_long_logs_leave_room_for_what_happened(tmp_path):
    message = str(wait_until_dead(start("[print('x' * 300, i) for i in range(50)]", tmp_path)))
    assert message.endswith(" 49")
    assert len(message) < 2000


def test_the_log_passes_through(tmp_path, capfd):
    wait_until_dead(start("print('loading', flush=True)", tmp_path))
    wait_for_output(capfd, "loading")


def test_an_engine_that_ignores_the_request_is_killed(tmp_path, capfd):
    engine = start(IGNORE, tmp_path)
    wait_for_output(capfd, "up")
    began = time.monotonic()
    engine.stop(grace_seconds=0.3)
    assert not psutil.pid_exists(engine.pid)
    assert 0.3 <= time.monotonic() - began < 5


def test_the_workers_of_an_engine_end_with_it(tmp_path, capfd):
    engine = start(WORKER, tmp_path)
    worker = psutil.Process(int(wait_for_output(capfd, "worker").split()[-1]))
    engine.stop(grace_seconds=5)
    assert gone([worker])


def test_an_engine_leads_a_group_in_the_session_that_the_agent_ends(tmp_path):
    engine = start("import time; time.sleep(600)", tmp_path)
    try:
        assert os.getpgid(engine.pid) == engine.pid
        assert os.getsid(engine.pid) == os.getsid(0)
    finally:
        engine.stop(grace_seconds=5)


def test_an_engine_dies_with_a_killed_parent(tmp_path):
    program = (
        "import os, sys, time; from pathlib import Path\n"
        "from headrace_trainer.stages.deploy.engine import EngineProcess\n"
        "e = EngineProcess(['sleep', '600'], env=dict(os.environ), cwd=Path('.'))\n"
        "print(e.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert parent.stdout is not None
    engine = psutil.Process(int(parent.stdout.readline()))
    assert engine.is_running()
    parent.kill()
    parent.wait()
    assert gone([engine])


def test_two_runs_are_given_two_ports_before_either_listens():
    with claimed_port(FIRST_PORT + 500) as first, claimed_port(first) as second:
        assert second > first
    with claimed_port(first) as again:
        assert again == first


def test_a_port_that_somebody_listens_on_is_passed_over():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with claimed_port(taken) as port:
            assert port > taken


def test_no_free_port_is_the_users_to_mend():
    with claimed_port(65535) as last:
        assert last == 65535
        with pytest.raises(UserError, match=r"^deploy\.port: 65535: "), claimed_port(65535):
            pass


@pytest.fixture
def answering():
    """Start servers that give one answer to everything."""
    servers: list[HTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (500, b"no such kernel", "500 Internal Server Error: no such kernel"),
        (200, b"<html>", "not JSON"),
        (200, b'{"data": []}', "list index out of range"),
        (200, b'{"models": []}', "'data'"),
        (200, b"[]", "list indices"),
    ],
)
def test_what_is_no_completion_is_said(answering, status, body, said):
    address = answering(status, body)
    with pytest.raises(Refused) as caught:
        complete(address, max_tokens=1, timeout_seconds=5)
    assert said in str(caught.value)
    assert caught.value.status == status


def test_a_proxy_of_the_environment_is_not_asked(answering, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(Refused):
        complete(answering(200, b"[]"), max_tokens=1, timeout_seconds=5)


def test_a_server_that_refuses_completions_does_not_serve(exported, tmp_path):
    ctx = StageContext(resolved=deploy_stage(exported.storage, exported.ref), scratch=tmp_path)
    with claimed_port(FIRST_PORT + 600) as port:
        command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
        engine = EngineProcess(command, env=dict(os.environ), cwd=tmp_path)
        try:
            with pytest.raises(EngineFailed, match=r"does not answer a completion: .*/v1/models: 404 "):
                serve_stage._wait_for_answer(ctx, engine, local_place(port))
        finally:
            engine.stop(grace_seconds=5)


def test_the_probe_loads_nothing_heavy():
    program = (
        "import sys, headrace_trainer.stages.deploy.ready\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'psutil', 'boto3'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
