"""The deploy stage: find the engine, fetch the model, start, wait for a completion, keep serving."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from headrace_api.contract import served_model_name
from headrace_api.stages import Deploy
from headrace_trainer.errors import Stopped
from headrace_trainer.stage import StageContext, write_atomically
from headrace_trainer.stages.deploy.client import Refused, complete
from headrace_trainer.stages.deploy.command import Served, engine_command, engine_environment, find_program, hub_cache
from headrace_trainer.stages.deploy.engine import EngineProcess
from headrace_trainer.stages.deploy.hub import link_into_cache
from headrace_trainer.stages.deploy.place import Place, cluster_place, local_place
from headrace_trainer.stages.deploy.port import claimed_port
from headrace_trainer.stages.deploy.ready import SERVER_FILE

_POLL_SECONDS = 0.2
_REPORT_SECONDS = 5.0
"""Reports are infrequent: each one is a request to the operator and says nothing new."""
_START_SECONDS = 1800.0
"""Large models take minutes to read from disk; an engine that needs longer than this hangs."""
_ANSWER_SECONDS = 60.0
"""For the first completion, which may compile. Shorter than the agent's grace period, since a stop waits for it."""
_STOP_SECONDS = 20.0
"""For requests in flight when the stop comes."""
_UNAVAILABLE = 503


def run_deploy(ctx: StageContext) -> NoReturn:
    """Serve until asked to stop. Raises as ``run`` in this package does."""
    config = ctx.config
    assert isinstance(config, Deploy)
    program = find_program(config.engine)
    served = Served(
        name=served_model_name(ctx.resolved.run, config.from_.model),
        folder=ctx.input("model"),
        dtype=json.loads((ctx.input("model") / "config.json").read_text())["dtype"],
        num_gpus=ctx.resolved.stage.compute.gpus_per_node,
    )
    home = _engine_home(ctx, served)
    with _place(ctx, config) as place:
        write_atomically(ctx.scratch / SERVER_FILE, json.dumps({"port": place.port}))
        command = engine_command(config.engine, program, served, place)
        # In a working directory that has a folder of the model's name, an engine would load that folder.
        engine = EngineProcess(command, env=engine_environment(os.environ, home=home), cwd=home)
        try:
            _wait_for_answer(ctx, engine, place)
            _stay(ctx, engine, place, model=served.name)
        finally:
            engine.stop(grace_seconds=_STOP_SECONDS)


def _engine_home(ctx: StageContext, served: Served) -> Path:
    home = ctx.scratch / "engine"
    link_into_cache(served.folder, hub_cache(home), name=served.name, digest=ctx.resolved.inputs["model"].digest)
    return home


@contextmanager
def _place(ctx: StageContext, config: Deploy) -> Iterator[Place]:
    """In a pod, the configured port: the Service relies on it. Elsewhere, the next free one, reserved."""
    if _in_cluster(ctx):
        yield cluster_place(ctx.resolved, port=config.port)
    else:
        with claimed_port(config.port) as port:
            yield local_place(port)


def _in_cluster(ctx: StageContext) -> bool:
    """Whether the operator created this pod. A local run may be inside a pod too, as in CI, but reports to a file."""
    return "KUBERNETES_SERVICE_HOST" in os.environ and not (ctx.resolved.progress_url or "").startswith("file:")


def _wait_for_answer(ctx: StageContext, engine: EngineProcess, place: Place) -> None:
    """Wait for a completion: health checks pass even on servers whose model cannot generate."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        _check(ctx, engine)
        ctx.report(phase="Starting", message=f"waiting for the first completion of {engine.name}")
        try:
            complete(place.local, max_tokens=1, timeout_seconds=_ANSWER_SECONDS)
            return
        except Refused as error:
            if error.status != _UNAVAILABLE:
                raise engine.failed(f"does not answer a completion: {error}") from error
        except OSError:
            pass  # not listening yet, or just died, which the next check finds
        time.sleep(_POLL_SECONDS)
    raise engine.failed(f"did not answer within {_START_SECONDS:.0f} s")


def _stay(ctx: StageContext, engine: EngineProcess, place: Place, *, model: str) -> NoReturn:
    reported = -math.inf
    while True:
        _check(ctx, engine)
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            ctx.report(phase="Serving", endpoint=place.endpoint, message=f"{model} answers at {place.endpoint}")
        time.sleep(_POLL_SECONDS)


def _check(ctx: StageContext, engine: EngineProcess) -> None:
    if ctx.stop_requested():
        ctx.report(phase="Stopping", message="finishing requests in flight")
        raise Stopped("the server was asked to stop, and has")
    engine.check()
