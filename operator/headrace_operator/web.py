"""The operator's HTTP server: health, metrics, and whatever else is added to it."""

from collections.abc import Callable

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from headrace_operator.metrics import REGISTRY
from headrace_operator.progress import MAX_BODY_BYTES, ProgressEndpoint


def application(progress: ProgressEndpoint, *, ready: Callable[[], bool]) -> web.Application:
    """The routes."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if ready() else web.Response(text="starting\n", status=503)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    progress.add_to(app)
    return app


async def serve(app: web.Application, *, host: str, port: int) -> web.AppRunner:
    """Listen; ``cleanup()`` of the returned runner ends it."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
