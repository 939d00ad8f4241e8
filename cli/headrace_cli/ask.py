"""Have a run's server continue a text. This needs no chat template; ``chat`` does."""

import json

from headrace_cli.server import Server, request, talking_to


def ask(server: Server, prompt: str, *, max_tokens: int) -> str:
    """The model's continuation of ``prompt``, decoded greedily.

    Args:
        server: the server to ask.
        prompt: the text to continue.
        max_tokens: the longest continuation.

    Raises:
        Problem: no answer, an answer that is no completion, or another run's server.
    """
    with talking_to(server, wanted="completion"):
        body = {"model": server.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        with request(f"{server.endpoint}/v1/completions", body) as answer:
            return str(json.load(answer)["choices"][0]["text"])
