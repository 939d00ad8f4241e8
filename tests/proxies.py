"""What can go wrong between an operator and its API server, for tests: connections that go silent, answers that are not
the server's, streams that break.
"""

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

Json = dict[str, Any]
T = TypeVar("T")


class Background:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=30)

    def stop(self) -> None:
        async def cancel_all() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.wait(others, timeout=5) if others else None

        self.call(cancel_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=10)


@dataclass
class TcpProxy:
    """Forwards bytes between a port of its own and the server's."""

    target: int
    port: int = 0
    _background: Background = field(default_factory=Background)
    _server: asyncio.Server | None = None
    _open: set[asyncio.Event] = field(default_factory=set)
    """Of each connection: whether it forwards."""

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def silence(self) -> int:
        """Forward nothing more on the connections that there are, but leave them open; returns how many those are."""

        async def clear() -> int:
            for forwarding in self._open:
                forwarding.clear()
            return len(self._open)

        return self._background.call(clear())

    def start(self) -> None:
        async def listen() -> None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            self.port = self._server.sockets[0].getsockname()[1]

        self._background.start()
        self._background.call(listen())

    def stop(self) -> None:
        self._background.stop()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        forwarding = asyncio.Event()
        forwarding.set()
        self._open.add(forwarding)
        try:
            up = await asyncio.open_connection("127.0.0.1", self.target)
            ways = [self._copy(reader, up[1], forwarding), self._copy(up[0], writer, forwarding)]
            await asyncio.wait([asyncio.create_task(way) for way in ways], return_when=asyncio.FIRST_COMPLETED)
            up[1].close()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(forwarding)
            writer.close()

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, forwarding: asyncio.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                await forwarding.wait()
                writer.write(data)
                await writer.drain()


Answer = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


@dataclass
class ApiProxy:
    """Asks the API server as an administrator, and lets a test answer instead.

    Attributes:
        faults: asked in turn for an answer to each request; the server answers where all say None.
        asked: every request, as it came.
        streamed: called with each event of a watch; returns the lines to pass on, or raises to break the stream.
    """

    target: str
    token: str
    port: int = 0
    faults: list[Answer] = field(default_factory=list)
    asked: list[web.Request] = field(default_factory=list)
    streamed: Callable[[web.Request, Json], list[Json]] = lambda _, event: [event]
    _background: Background = field(default_factory=Background)
    _runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, method: str, part: str) -> int:
        """How many requests there were with a method and a part of the address."""
        return sum(r.method == method and part in r.path_qs for r in list(self.asked))

    def start(self) -> None:
        async def listen() -> None:
            self._runner = web.AppRunner(self._application(), shutdown_timeout=0.1)
            await self._runner.setup()
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
            self.port = self._runner.addresses[0][1]

        self._background.start()
        self._background.call(listen())

    def stop(self) -> None:
        assert self._runner is not None
        self._background.call(self._runner.cleanup())
        self._background.stop()

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{address:.*}", self._serve)
        app.cleanup_ctx.append(self._session)
        return app

    async def _session(self, app: web.Application) -> AsyncIterator[None]:
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        connector = aiohttp.TCPConnector(ssl=trusting, limit=0)
        async with aiohttp.ClientSession(connector=connector, read_bufsize=2**21) as self._upstream:
            yield

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        for fault in list(self.faults):
            answer = await fault(request)
            if answer is not None:
                return answer
        headers = {k: v for k, v in request.headers.items() if k in ("Accept", "Content-Type")}
        headers["Authorization"] = f"Bearer {self.token}"
        address, body = f"{self.target}{request.path_qs}", await request.read() or None
        try:
            async with self._upstream.request(request.method, address, data=body, headers=headers) as answer:
                if request.query.get("watch") == "true" and answer.status == 200:
                    return await self._stream(request, answer)
                data = await answer.read()
                return web.Response(status=answer.status, body=data, content_type="application/json")
        except aiohttp.ClientError:
            return web.Response(status=502, text="bad gateway")

    async def _stream(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        async for line in answer.content:
            try:
                lines = self.streamed(request, json.loads(line))
            except ConnectionError:
                assert request.transport is not None
                request.transport.abort()
                break
            for event in lines:
                await response.write(json.dumps(event).encode() + b"\n")
        return response


@contextlib.contextmanager
def started(proxy: Any) -> Iterator[Any]:
    """A proxy that is stopped again."""
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def always(status: int, text: str = "", *, part: str = "", method: str = "") -> Answer:
    """A fault: the same answer to every request with a method and a part in its address."""

    async def answer(request: web.Request) -> web.StreamResponse | None:
        meant = part in request.path_qs and method in ("", request.method)
        return web.Response(status=status, text=text, content_type="application/json") if meant else None

    return answer
