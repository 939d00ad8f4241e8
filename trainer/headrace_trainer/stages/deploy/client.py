"""One completion over HTTP, using only the standard library: ``stage`` waits for it, ``ready`` probes with it."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

PROMPT = "The"
"""The probe's prompt: any tokenizer turns it into at least one token."""

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Bypasses any proxy: the server is on this machine."""


class Refused(Exception):
    """The server answered, but not with a completion.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


def complete(address: str, *, max_tokens: int, timeout_seconds: float) -> str:
    """The greedy continuation of ``PROMPT``, requested like any OpenAI client would, from the model that is listed.

    Args:
        address: such as ``http://127.0.0.1:8000``.
        max_tokens: the longest continuation.
        timeout_seconds: for each of the two requests.

    Raises:
        Refused: an error, or an answer in another format.
        OSError: no answer.
    """
    models = _call(f"{address}/v1/models", timeout_seconds=timeout_seconds)
    try:
        body = {"model": models["data"][0]["id"], "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0}
        answer = _call(f"{address}/v1/completions", body, timeout_seconds=timeout_seconds)
        return str(answer["choices"][0]["text"])
    except (KeyError, IndexError, TypeError) as error:
        raise Refused(f"{address}: the answer lacks {error}", status=200) from error


def _call(url: str, body: dict[str, Any] | None = None, *, timeout_seconds: float) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with _opener.open(request, timeout=timeout_seconds) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        detail = error.read(500).decode(errors="replace")
        raise Refused(f"{url}: {error.code} {error.reason}: {detail}", status=error.code) from error
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: {error!r}") from error
    except ValueError as error:
        raise Refused(f"{url}: not JSON: {error}", status=200) from error
