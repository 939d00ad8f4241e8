"""Chat with the model that a run serves, streaming its answers.

In: a ``Server`` and what the user types. Out: pieces of text. The protocol is OpenAI's ``/v1/chat/completions`` with
server-sent events. ``Conversation`` keeps the history and sends it with every turn.
"""

import json
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace_cli.problem import ExitCode, Problem
from headrace_cli.server import Server, request, talking_to

_ASK_FOR_LINES = "> "
_ENDED = "[DONE]"
_SHOWN_CONTROLS = "\n\t"


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Sampling settings of the answers."""

    max_tokens: int
    """The longest answer, in tokens."""
    temperature: float | None = None
    """0 decodes greedily; None uses the model's generation_config.json."""


@dataclass
class Conversation:
    """The turns so far. ``say`` adds one."""

    server: Server
    answering: Answering
    messages: list[dict[str, str]] = field(default_factory=list)
    finish_reason: str = ""
    """Why the last answer ended: ``stop``, or ``length`` if it was cut off."""

    def say(self, text: str) -> Generator[str, None, None]:
        """Send a user turn and yield the answer piece by piece.

        If the caller closes the iterator, the history keeps the part of the answer received so far. A turn without any
        answer is dropped from the history, so that it can be sent again.

        Raises:
            Problem: no answer, or the answer broke off.
        """
        said: list[str] = []
        self.messages.append({"role": "user", "content": text})
        try:
            for piece in self._stream():
                said.append(piece)
                yield piece
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                self.messages.pop()

    def _stream(self) -> Iterator[str]:
        body: dict[str, Any] = {
            "model": self.server.model,
            "messages": self.messages,
            "max_tokens": self.answering.max_tokens,
            "stream": True,
        }
        if self.answering.temperature is not None:
            body["temperature"] = self.answering.temperature
        self.finish_reason = ""
        with talking_to(self.server, wanted="answer"):
            with request(f"{self.server.endpoint}/v1/chat/completions", body) as answer:
                for event in events(answer):
                    yield from self._pieces(event)
            if not self.finish_reason:
                raise Problem(f"{self.server.endpoint}: the answer broke off", code=ExitCode.FAILED)

    def _pieces(self, event: str) -> Iterator[str]:
        if event == _ENDED:
            self.finish_reason = self.finish_reason or "stop"
            return
        chunk = json.loads(event)
        if "error" in chunk:
            raise Problem(f"{self.server.endpoint}: {chunk['error']}", code=ExitCode.FAILED)
        for choice in chunk["choices"]:
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if piece := choice.get("delta", {}).get("content"):
                yield piece


def events(lines: Iterable[bytes]) -> Iterator[str]:
    """Parse server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) and yield their data.

    The last event is yielded even if its blank line is missing.
    """
    data: list[str] = []
    for line in lines:
        text = line.decode().rstrip("\r\n")
        if text.startswith("data:"):
            data.append(text.removeprefix("data:").removeprefix(" "))
        elif not text and data:
            yield "\n".join(data)
            data = []
    if data:
        yield "\n".join(data)


def check_template(server: Server, *, name: str) -> None:
    """Check that the served model has a chat template. A model that is not stored on this machine is not checked.

    Args:
        server: the server of the model.
        name: the run's name.

    Raises:
        Problem: it has none; says what to do instead.
    """
    folder = Path(server.model_uri.removeprefix("file://"))
    config = folder / "tokenizer_config.json"
    if not config.is_file() or (folder / "chat_template.jinja").is_file():
        return
    if not json.loads(config.read_text()).get("chat_template"):
        raise Problem(
            f"{name}: {server.model} has no chat template, so it cannot chat: have it continue a text with "
            f"`headrace ask {name} PROMPT`, or add an sft stage before the export"
        )


def printable(text: str) -> str:
    """Replace control characters: a model must not move the cursor or change colours."""
    return "".join(c if c.isprintable() or c in _SHOWN_CONTROLS else "\ufffd" for c in text)


def converse(conversation: Conversation, *, write: Callable[[str], object], note: Callable[[str], object]) -> None:
    """Chat on a terminal until Ctrl-D. Ctrl-C stops an answer, or drops the line being typed."""
    _edit_lines()
    while True:
        try:
            line = input(_ASK_FOR_LINES)
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")
            continue
        if line.strip():
            answer(conversation, line, write=write, note=note)


def answer(
    conversation: Conversation, prompt: str, *, write: Callable[[str], object], note: Callable[[str], object]
) -> None:
    """Write one answer as it streams in, and say so if it is not complete."""
    try:
        with closing(conversation.say(prompt)) as pieces:
            for piece in pieces:
                write(printable(piece))
    except KeyboardInterrupt:
        write("\n")
        note("stopped")
        return
    write("\n")
    if conversation.finish_reason == "length":
        note(f"cut at --max-tokens {conversation.answering.max_tokens}")


def _edit_lines() -> None:
    """Let ``input`` edit lines, if this Python can."""
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401  # its import is what does it
        except ImportError:
            return
