"""Find a run's server and talk to it. Ports get reused, so check that the server really is this run's.

In: a run's folder and its live attempts. Out: a ``Server``, and HTTP requests to it. Used by ``ask`` and ``chat``.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from headrace_api.contract import served_model_name
from headrace_cli.attempts import LocalAttempts
from headrace_cli.home import RunFolder
from headrace_cli.live import Seen
from headrace_cli.problem import ExitCode, Problem

_TIMEOUT_SECONDS = 120
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Bypasses any proxy: the server is on this machine."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A live server of this run."""

    endpoint: str
    """Such as ``http://127.0.0.1:8000``."""
    model: str
    """The model name it must serve."""
    model_uri: str = ""
    """Where the model is stored."""


def find_server(folder: RunFolder, seen: Seen) -> Server:
    """Find the server started by an attempt of this run.

    Raises:
        Problem: no server is running; says how to start one.
    """
    attempts, run = LocalAttempts(folder=folder.attempts), seen.outline.command
    found = [(a, r, r.stage.deploy) for a in seen.live if (r := attempts.resolved(a)) is not None]
    servers = [(attempt, resolved, deploy) for attempt, resolved, deploy in found if deploy is not None]
    if not servers and "deploy" not in seen.outline.kinds.values():
        raise Problem(f"{folder.name}: no deploy stage, so no model is served; add one and start it with {run}")
    if not servers:
        raise Problem(f"{folder.name}: no server is running; start it with {run}", code=ExitCode.FAILED)
    # Prefer the newest that answers: an older one stays up until the next one does.
    for attempt, resolved, deploy in sorted(servers, key=lambda server: server[0].number, reverse=True):
        if attempt.progress is not None and attempt.progress.endpoint is not None:
            model = served_model_name(folder.name, deploy.from_.model)
            uri = resolved.inputs["model"].uri
            return Server(endpoint=attempt.progress.endpoint, model=model, model_uri=uri)
    raise Problem(f"{folder.name}: {servers[0][0].stage} does not answer yet; try again shortly", code=ExitCode.FAILED)


@contextmanager
def talking_to(server: Server, *, wanted: str) -> Iterator[None]:
    """Check that the server is this run's, then turn the errors of a block of requests into problems.

    Args:
        server: the server to ask.
        wanted: what the requests are for, for the error message.

    Raises:
        Problem: no answer, an answer of another form, or another run's server.
    """
    try:
        with request(f"{server.endpoint}/v1/models") as answer:
            listed = [model["id"] for model in json.load(answer)["data"]]
        if listed != [server.model]:
            raise Problem(
                f"{server.endpoint}: serves {', '.join(listed) or 'nothing'}, not {server.model}: another server took "
                "the port",
                code=ExitCode.FAILED,
            )
        yield
    except urllib.error.HTTPError as error:
        said = error.read(500).decode(errors="replace")
        raise Problem(f"{server.endpoint}: {error.code}: {said}", code=ExitCode.FAILED) from error
    except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
        raise Problem(f"{server.endpoint}: no {wanted}: {error}", code=ExitCode.FAILED) from error


def request(url: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
    """Send a GET, or a POST if there is a ``body``. The answer's body is still to be read."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    answer: http.client.HTTPResponse = _DIRECT.open(asked, timeout=_TIMEOUT_SECONDS)
    return answer
