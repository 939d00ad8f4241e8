"""`ask` trusts only a server that serves this run's model."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from headrace_cli.ask import ask
from headrace_cli.problem import Problem
from headrace_cli.server import Server


class Impostor(BaseHTTPRequestHandler):
    """An OpenAI-compatible server of the model ``other/ship``."""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "other/ship"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({"choices": [{"text": " from another model"}]})

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Impostor)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_of_another_model_is_not_believed(endpoint):
    with pytest.raises(Problem, match="serves other/ship, not demo/ship: another server took the port"):
        ask(Server(endpoint=endpoint, model="demo/ship"), "Hello", max_tokens=4)


def test_a_server_of_this_model_is(endpoint):
    assert ask(Server(endpoint=endpoint, model="other/ship"), "Hello", max_tokens=4) == " from another model"


def test_a_port_that_nobody_listens_on():
    with pytest.raises(Problem, match=r"http://127\.0\.0\.1:9: no completion"):
        ask(Server(endpoint="http://127.0.0.1:9", model="demo/ship"), "Hello", max_tokens=4)
