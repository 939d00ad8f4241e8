"""A critic behind OpenAI's protocol, /chat/completions.

In: questions. Out: replies, or why there is none. ``Client`` sends one request and repeats it; ``EndpointSpeaker`` has
many under way on one rank of each replica, while all ranks of the gang wait together, ready to stop.
"""

import hashlib
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import urllib3

from headrace_api.base import parse_duration
from headrace_api.stages.constitutional import Endpoint
from headrace_trainer import board
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.errors import Stopped, UserError
from headrace_trainer.formats.records.shapes import Turn
from headrace_trainer.stages.constitutional.asking import Ask
from headrace_trainer.stages.constitutional.speakers import Failure, Manner, Reason, Said

FIELD = "constitutional.critic.endpoint"
_MOST_BYTES = 4 << 20
_SHOWN = 200
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
_LOOK_SECONDS = 0.5
_SPARE_SECONDS = 30.0
"""Beyond its time-out and the longest pause, a request that neither ends nor is repeated hangs."""
_CHOICE_TOKENS = 8
_MOST_LIKELY = 20
"""Alternatives to a token that servers give."""
_REPEATED = frozenset({408, 425, 429, 500, 502, 503, 504})
_NOT_UNDERSTOOD = frozenset({400, 413, 422})
"""The one request cannot be answered; others may be."""


class Unanswered(Exception):
    """There is no reply to a request, and why."""

    def __init__(self, reason: Reason, detail: str, *, status: int = 0, wait_seconds: float = 0.0) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.status, self.wait_seconds = reason, detail, status, wait_seconds


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a server answered."""

    text: str
    ended: bool
    tokens: tuple[Mapping[str, Any], ...] = ()
    """Each with its ``top_logprobs``, where the server gives them."""


class Client:
    """Sends requests from any number of threads.

    Args:
        config: the block.
        moved: called whenever an attempt has ended.
        cancelled: is set where nobody waits any more.
    """

    def __init__(self, config: Endpoint, *, moved: Callable[[], None], cancelled: threading.Event) -> None:
        self._config, self._moved, self._cancelled = config, moved, cancelled
        self._token = token_of(config)
        self.timeout_seconds = parse_duration(config.timeout)
        self._pool = urllib3.PoolManager(maxsize=config.at_once, retries=False)
        self._gives_log_probs = True

    def reply(self, messages: Sequence[Turn], *, seed: int, manner: Manner) -> Reply:
        """A reply to a conversation.

        Raises:
            Unanswered: there is none, for this request.
            UserError: the server will answer none.
        """
        return self._repeated(self._body(messages, seed, max_tokens=manner.max_new_tokens, heat=manner.temperature))

    def choice(self, messages: Sequence[Turn], options: tuple[str, str], *, seed: int) -> float:
        """The probability of the first option, given that the reply is one of the two: 0 or 1 without log-probabilities.

        Raises:
            Unanswered: the reply is none of them, or there is none.
            UserError: the server will answer none.
        """
        body = self._body(messages, seed, max_tokens=_CHOICE_TOKENS, heat=0.0)
        if not self._gives_log_probs:
            return probability(self._repeated(body), options)
        try:
            asked = body | {"logprobs": True, "top_logprobs": _MOST_LIKELY}
            return probability(self._repeated(asked), options)
        except Unanswered as error:
            if error.status not in _NOT_UNDERSTOOD:
                raise
        found = probability(self._repeated(body), options)
        self._gives_log_probs = False  # it was the log-probabilities that were not understood
        return found

    def _body(self, messages: Sequence[Turn], seed: int, *, max_tokens: int, heat: float) -> dict[str, Any]:
        return {
            "model": self._config.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": heat,
            "seed": seed,
        }

    def _repeated(self, body: Mapping[str, Any]) -> Reply:
        for attempt in range(self._config.retries + 1):
            try:
                return self._once(body)
            except Unanswered as error:
                if error.status in _NOT_UNDERSTOOD or error.reason is not Reason.ENDPOINT:
                    raise
                last = error
            finally:
                self._moved()
            pause = max(last.wait_seconds, _FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1))
            pause = min(_LONGEST_PAUSE_SECONDS, pause)
            if attempt < self._config.retries and self._cancelled.wait(pause):
                break
        raise last

    def _once(self, body: Mapping[str, Any]) -> Reply:
        status, data, wait_seconds = self._post(json.dumps(body).encode())
        if status in _REPEATED or status in _NOT_UNDERSTOOD:
            said = f"{status}: {self._shown(data)}"
            raise Unanswered(Reason.ENDPOINT, said, status=status, wait_seconds=wait_seconds)
        if status != 200:
            raise UserError(self._refusal(status, data))
        return _reply(data, shown=self._shown(data))

    def _post(self, body: bytes) -> tuple[int, bytes, float]:
        """Status, body, and for how long the server wants to be left alone."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        deadline = time.monotonic() + self.timeout_seconds
        try:
            response = self._pool.request(
                "POST",
                f"{self._config.url.rstrip('/')}/chat/completions",
                body=body,
                headers=headers,
                timeout=urllib3.Timeout(total=self.timeout_seconds),
                redirect=False,  # a token goes where it was meant to go
                preload_content=False,
            )
            try:
                return response.status, self._read(response, deadline), _seconds(response.headers.get("Retry-After"))
            finally:
                response.release_conn()
        except urllib3.exceptions.HTTPError as error:
            raise Unanswered(Reason.ENDPOINT, self._shown(f"{type(error).__name__}: {error}".encode())) from error

    def _read(self, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
        """The body; a server that drips keeps nobody longer than one that is silent."""
        data = bytearray()
        for part in response.stream(1 << 16):
            data += part
            if len(data) > _MOST_BYTES:
                response.close()
                raise Unanswered(Reason.RUBBISH, f"an answer of more than {_MOST_BYTES >> 20} MiB")
            if time.monotonic() > deadline:
                response.close()
                raise Unanswered(Reason.ENDPOINT, f"not whole after {self.timeout_seconds:g} s")
        return bytes(data)

    def _refusal(self, status: int, data: bytes) -> str:
        if status in (401, 403):
            variable = self._config.token_variable
            remedy = f"put a token that it accepts into {variable}" if variable else "set tokenVariable"
            return f"{FIELD}.tokenVariable: {variable}: the server answers {status}: {remedy}"
        if status == 404:
            said = f"the server answers 404: {self._shown(data)}: check url and model ({self._config.model!r})"
            return f"{FIELD}.url: {self._config.url!r}: {said}"
        return f"{FIELD}.url: {self._config.url!r}: the server answers {status}: {self._shown(data)}: check url"

    def _shown(self, data: bytes) -> str:
        """The beginning of what a server said, on one line, without the token."""
        text = data[: 4 * _SHOWN].decode(errors="replace")
        if self._token:
            text = text.replace(self._token, "***")
        return " ".join(text.split())[:_SHOWN]


def token_of(config: Endpoint) -> str | None:
    """The token, from the environment; None if none is sent.

    Raises:
        UserError: its variable is not set.
    """
    if config.token_variable is None:
        return None
    token = os.environ.get(config.token_variable, "").strip()
    if not token:
        raise UserError(
            f"{FIELD}.tokenVariable: {config.token_variable}: is not set here: export it, or in a cluster let the "
            "TrainingRuntime's podTemplate set it from a Secret"
        )
    if not token.isascii() or not token.isprintable():
        raise UserError(
            f"{FIELD}.tokenVariable: {config.token_variable}: holds what no header may: set it to the token"
        )
    return token


def _seconds(header: str | None) -> float:
    """What Retry-After asks for, where it is a number; a date is not worth a clock."""
    return float(header) if header is not None and re.fullmatch(r"[0-9]{1,9}", header.strip()) else 0.0


def _reply(data: bytes, *, shown: str) -> Reply:
    try:
        (chosen, *_) = json.loads(data)["choices"]
        text, tokens = chosen["message"]["content"], (chosen.get("logprobs") or {}).get("content") or []
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unanswered(Reason.RUBBISH, f"no choices[0].message.content: {shown}") from error
    if not isinstance(text, str) or not isinstance(tokens, list) or not all(isinstance(t, dict) for t in tokens):
        raise Unanswered(Reason.RUBBISH, f"choices[0].message.content is no text: {shown}")
    return Reply(text=text, ended=chosen.get("finish_reason") != "length", tokens=tuple(tokens))


def probability(reply: Reply, options: tuple[str, str]) -> float:
    """The probability of the first of two options, given that it is one of them.

    Raises:
        Unanswered: the reply names none of them, or both.
    """
    wanted = [option.strip().casefold() for option in options]
    first_word = next((token for token in reply.tokens if _word(token.get("token"))), {})
    if _word(first_word.get("token")) in wanted:
        first, second = (_mass(first_word, option) for option in wanted)
        return first / (first + second)
    words = re.findall(r"\w+", reply.text.casefold())
    found = {option for option in wanted if option in words}
    if len(found) != 1:
        raise Unanswered(
            Reason.RUBBISH, f"asked for {options[0].strip()} or {options[1].strip()}: {reply.text[:_SHOWN]!r}"
        )
    return float(wanted[0] in found)


def _mass(token: Mapping[str, Any], option: str) -> float:
    """The probability of all spellings of an option among a token's alternatives; a little where none is there."""
    alternatives = token.get("top_logprobs") or [token]
    spelled = [a.get("logprob") for a in alternatives if isinstance(a, dict) and _word(a.get("token")) == option]
    numbers = [float(p) for p in spelled if isinstance(p, int | float) and p <= 0]
    return max(1e-12, math.fsum(math.exp(p) for p in numbers))


def _word(token: object) -> str:
    return re.sub(r"\W+", "", token).casefold() if isinstance(token, str) else ""


class EndpointSpeaker:
    """A server that answers questions; see ``speakers.Speaker``.

    Args:
        config: the block.
        seed: of the run.
        gang: this rank's place.
        stop_requested: whether this pod was asked to stop.
    """

    def __init__(self, config: Endpoint, *, seed: int, gang: Gang, stop_requested: Callable[[], bool]) -> None:
        self._config, self._seed, self._gang, self._stop_requested = config, seed, gang, stop_requested
        self._cancelled = threading.Event()
        self._ended, self._lock = 0, threading.Lock()
        self._asks = gang.tensor_rank == 0 and gang.is_first_stage
        self._client = Client(config, moved=self._count, cancelled=self._cancelled)

    def say(self, asks: Sequence[Ask], manner: Manner) -> list[Said | Failure]:
        """See ``Speaker``."""

        def one(ask: Ask) -> Said:
            reply = self._client.reply(_messages(ask), seed=self._seed_of(ask), manner=manner)
            return Said(text=reply.text, ended=reply.ended)

        return self._all(one, asks)

    def choose(self, asks: Sequence[Ask]) -> list[float | Failure]:
        """See ``Speaker``."""

        def one(ask: Ask) -> float:
            assert ask.options is not None
            return self._client.choice(_messages(ask), ask.options, seed=self._seed_of(ask))

        return self._all(one, asks)

    def _seed_of(self, ask: Ask) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed} {ask.id}".encode()).digest()[:4], "big") >> 1

    def _count(self) -> None:
        with self._lock:
            self._ended += 1

    def _all(self, one: Callable[[Ask], Any], asks: Sequence[Ask]) -> list[Any]:
        """Every reply, on every rank of the replica. Every rank of the gang calls.

        Raises:
            Stopped: on request, of any pod.
            UserError: the server will answer none.
        """
        pool = ThreadPoolExecutor(self._config.at_once)
        try:
            futures = [pool.submit(one, ask) for ask in asks] if self._asks else []
            self._wait(futures)
        except BaseException:
            self._cancelled.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        mine = (self._gang.data_rank, [_result(future) for future in futures]) if self._asks else None
        parts = [part for part in self._gang.gather(mine) if part is not None]
        return next(replies for replica, replies in parts if replica == self._gang.data_rank)

    def _wait(self, futures: Sequence[Future[Any]]) -> None:
        """Until all ranks' requests have ended. Nobody is silent meanwhile: each request has its limit in time."""
        ended, moved_at = self._ended, time.monotonic()
        silence = self._client.timeout_seconds + _LONGEST_PAUSE_SECONDS + _SPARE_SECONDS
        while True:
            _, pending = wait(futures, timeout=_LOOK_SECONDS if futures else 0)
            fatal = next((e for f in futures if f.done() and isinstance(e := _error(f), UserError)), None)
            waiting, stopping, refused = self._gang.sum(
                [len(pending), float(self._stop_requested()), float(fatal is not None)]
            )
            if refused:
                raise UserError(next(m for m in self._gang.gather(str(fatal) if fatal else None) if m is not None))
            if stopping:
                raise Stopped("asked to stop while a critic was asked; what is finished is kept")
            if not waiting:
                return
            if self._ended != ended:
                ended, moved_at = self._ended, time.monotonic()
            if time.monotonic() - moved_at < silence or not pending:
                board.beat()


def _messages(ask: Ask) -> list[Turn]:
    return [{"role": "user", "content": ask.text}] if isinstance(ask.text, str) else ask.text


def _error(future: Future[Any]) -> BaseException | None:
    return None if future.cancelled() else future.exception()


def _result(future: Future[Any]) -> Any:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, Unanswered):
        return Failure(reason=error.reason, detail=error.detail)
    raise error
