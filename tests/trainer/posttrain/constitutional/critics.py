"""A real server that speaks OpenAI's protocol, and misbehaves as asked."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]


@dataclass
class Trouble:
    """What goes wrong, each so many times, before the server is good again."""

    errors: int = 0
    """Answers of 500."""
    silences: int = 0
    """Requests that get no answer for longer than anybody waits."""
    cuts: int = 0
    """Connections that are closed without an answer."""
    token: str | None = None
    """The only one that is accepted."""
    refusals: int = 0
    """Answers of 400."""
    gives_log_probs: bool = True
    retry_after: str | None = None
    """What comes with an answer of 500."""
    moved_to: str | None = None
    """Where every request is sent to."""


@dataclass
class Critic:
    """A server while it runs."""

    url: str
    requests: list[Json] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)


@contextmanager
def serving(reply: Callable[[Json], Any], trouble: Trouble | None = None) -> Iterator[Critic]:
    """Serve ``reply``: of a request's body, the text of a message, or of a choice, the probability of its first option.
    What is bytes is sent as it is."""
    trouble, lock = trouble or Trouble(), threading.Lock()

    def takes(name: str) -> bool:
        with lock:
            left = getattr(trouble, name)
            if left:
                setattr(trouble, name, left - 1)
            return bool(left)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                critic.requests.append(body)
            if trouble.token is not None and self.headers["Authorization"] != f"Bearer {trouble.token}":
                self._send(401, f"no such token: {self.headers['Authorization']}".encode())
            elif trouble.moved_to is not None:
                self._send(307, b"", Location=trouble.moved_to)
            elif takes("errors"):
                self._send(500, b"try again", **({"Retry-After": trouble.retry_after} if trouble.retry_after else {}))
            elif takes("refusals"):
                self._send(400, b"too many tokens")
            elif takes("silences"):
                time.sleep(3)
            elif takes("cuts"):
                self.close_connection = True
            elif "logprobs" in body and not trouble.gives_log_probs:
                self._send(400, b"logprobs is not supported")
            else:
                self._send(200, _answer(body, reply(body)))

        def _send(self, status: int, data: bytes, **headers: str) -> None:
            with lock:
                critic.answered[str(status)] += 1
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    critic = Critic(url=f"http://127.0.0.1:{server.server_address[1]}/v1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield critic
    finally:
        server.shutdown()
        server.server_close()


def _answer(body: Json, said: Any) -> bytes:
    if isinstance(said, bytes):
        return said
    choice: Json = {"finish_reason": "stop", "message": {"role": "assistant", "content": said}}
    if isinstance(said, tuple):
        (one, p), (other, q) = said
        choice["message"]["content"] = one if p >= q else other
        if body.get("logprobs"):
            top = [{"token": one, "logprob": p}, {"token": f" {other}", "logprob": q}]
            choice["logprobs"] = {
                "content": [{"token": choice["message"]["content"], "logprob": 0, "top_logprobs": top}]
            }
    return json.dumps({"choices": [choice]}).encode()


def asked(body: Json) -> str:
    """What a request's last turn says."""
    return str(body["messages"][-1]["content"])


def critic_at(server: Any, **fields: Any) -> Json:
    """The critic of a stage, at a server of ``serving``."""
    return {"endpoint": {"url": server.url, "model": "judge", "timeout": "1s", "retries": 3, **fields}}


def says_yes(body: Json) -> str:
    """Yes to whoever swears."""
    return " yes" if "ugh" in asked(body).partition("\n")[0] else " no"
