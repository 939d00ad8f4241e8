"""The operator's HTTP server: health, metrics and the progress endpoint."""

import asyncio
from collections.abc import Callable, Sequence

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from headrace_operator.metrics import REGISTRY, RunAndReports, RunFigures
from headrace_operator.progress import MAX_BODY_BYTES, ProgressEndpoint


class MetricsEndpoint:
    """Serves metrics. They are rendered in a thread and sent in chunks, so that no other request waits.

    Args:
        runs: returns the runs to export.
    """

    def __init__(self, runs: Callable[[], Sequence[RunAndReports]]) -> None:
        self._runs = runs
        self._figures = RunFigures()
        self._busy = asyncio.Lock()

    async def get(self, request: web.Request) -> web.StreamResponse:
        async with self._busy:
            pieces = await asyncio.to_thread(self._render, self._runs())
        response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE_LATEST})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        return response

    def _render(self, runs: Sequence[RunAndReports]) -> list[bytes]:
        return [generate_latest(REGISTRY), *self._figures.render(runs)]


def application(
    progress: ProgressEndpoint, *, ready: Callable[[], bool], runs: Callable[[], Sequence[RunAndReports]]
) -> web.Application:
    """Build the routes."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if ready() else web.Response(text="starting\n", status=503)

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", MetricsEndpoint(runs).get)
    progress.add_to(app)
    return app


async def serve(app: web.Application, *, host: str, port: int) -> web.AppRunner:
    """Start listening; ``cleanup()`` on the returned runner stops it."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
