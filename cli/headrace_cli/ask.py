"""One question to an OpenAI-compatible endpoint."""

import json
import urllib.error
import urllib.request
from typing import Any

_TIMEOUT_SECONDS = 120
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy for the outside world must not stand between this machine and its own server."""


class AskError(Exception):
    """The endpoint did not answer."""


def ask(endpoint: str, prompt: str, *, max_tokens: int) -> str:
    """The model's continuation of ``prompt``, greedily decoded.

    Args:
        endpoint: the server's address, as ``http://127.0.0.1:8000``.
        prompt: the text to continue.
        max_tokens: the longest answer.

    Raises:
        AskError: nothing answered, or not with a completion.
    """
    try:
        model = _call(f"{endpoint}/v1/models")["data"][0]["id"]
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return str(_call(f"{endpoint}/v1/completions", body)["choices"][0]["text"])
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise AskError(f"{endpoint}: no completion: {error}") from error


def _call(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with _DIRECT.open(request, timeout=_TIMEOUT_SECONDS) as answer:
        value = json.load(answer)
    if not isinstance(value, dict):
        raise ValueError(f"{url} answered with something else than an object")
    return value
