"""Reports over HTTP: new numbers as often as the operator asks for, news at once."""

import http.server
import json
import threading
import time
from datetime import UTC, datetime

import pytest

from headrace_api.contract import REPORT_AFTER_HEADER, Progress
from headrace_api.faults import Outcome
from headrace_trainer.agent.reporter import Reporter
from headrace_trainer.agent.settings import Settings
from trainer.data.builders import make_context


@pytest.fixture
def operator():
    """An operator that asks for a report every minute, and what it was told, with times."""
    told: list[tuple[float, dict]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.append((time.monotonic(), body["progress"]))
            self.send_response(204)
            self.send_header(REPORT_AFTER_HEADER, "60.0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/progress", told
    server.shutdown()
    server.server_close()


def progress(done: int, phase: str = "Running") -> Progress:
    return Progress(stage="corpus", attempt=1, phase=phase, done=done, time=datetime.now(UTC))


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_numbers_wait_as_long_as_the_operator_asks_and_news_does_not(operator, tmp_path):
    url, told = operator
    resolved = make_context(tmp_path, kind="corpus", config={"sources": [{"uri": "/raw"}]}).resolved
    reporter = Reporter(resolved.model_copy(update={"progress_url": url}), Settings.from_environment({}))
    reporter.send(progress(1))
    wait_for(lambda: len(told) == 1)
    for done in range(2, 60):  # three seconds of steps: longer than the interval of a pod that is alone
        reporter.send(progress(done))
        time.sleep(0.05)
    assert [body["done"] for _, body in told] == [1]
    reporter.send(progress(60, phase="Saving"))
    wait_for(lambda: len(told) == 2)
    assert (told[-1][1]["done"], told[-1][1]["phase"]) == (60, "Saving")
    reporter.send(progress(61, phase="Saving"))
    reporter.finish(Outcome())
    assert (len(told), told[-1][1]["done"], told[-1][1]["phase"]) == (3, 61, "Done")
