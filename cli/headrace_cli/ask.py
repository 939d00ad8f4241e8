"""Send a prompt to a run's server. Ports get reused, so check that the server really is this run's."""

import http.client
import json
import urllib.error
import urllib.request
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


def find_server(folder: RunFolder, seen: Seen) -> Server:
    """Find the server started by an attempt of this run.

    Raises:
        Problem: no server is running; says how to start one.
    """
    attempts, run = LocalAttempts(folder=folder.attempts), seen.outline.command
    found = [(a, r.stage.deploy) for a in seen.live if (r := attempts.resolved(a)) is not None]
    servers = [(attempt, deploy) for attempt, deploy in found if deploy is not None]
    if not servers and "deploy" not in seen.outline.kinds.values():
        raise Problem(f"{folder.name}: no deploy stage, so no model is served; add one and start it with {run}")
    if not servers:
        raise Problem(f"{folder.name}: no server is running; start it with {run}", code=ExitCode.FAILED)
    # Prefer the newest that answers: an older one stays up until the next one does.
    for attempt, deploy in sorted(servers, key=lambda server: server[0].number, reverse=True):
        if attempt.progress is not None and attempt.progress.endpoint is not None:
            model = served_model_name(folder.name, deploy.from_.model)
            return Server(endpoint=attempt.progress.endpoint, model=model)
    raise Problem(f"{folder.name}: {servers[0][0].stage} does not answer yet; try again shortly", code=ExitCode.FAILED)


def ask(server: Server, prompt: str, *, max_tokens: int) -> str:
    """The model's continuation of ``prompt``, decoded greedily.

    Args:
        server: the server to ask.
        prompt: the text to continue.
        max_tokens: the longest continuation.

    Raises:
        Problem: no answer, an answer that is no completion, or another run's server.
    """
    try:
        listed = [model["id"] for model in _call(f"{server.endpoint}/v1/models")["data"]]
        if listed != [server.model]:
            raise Problem(
                f"{server.endpoint}: serves {', '.join(listed) or 'nothing'}, not {server.model}: another server took "
                "the port",
                code=ExitCode.FAILED,
            )
        body = {"model": server.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return str(_call(f"{server.endpoint}/v1/completions", body)["choices"][0]["text"])
    except urllib.error.HTTPError as error:
        said = error.read(500).decode(errors="replace")
        raise Problem(f"{server.endpoint}: {error.code}: {said}", code=ExitCode.FAILED) from error
    except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
        raise Problem(f"{server.endpoint}: no completion: {error}", code=ExitCode.FAILED) from error


def _call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with _DIRECT.open(request, timeout=_TIMEOUT_SECONDS) as answer:
        return json.load(answer)
