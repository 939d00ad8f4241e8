"""The command line and environment of each engine. Pure, except for looking up the executable.

Both engines speak the OpenAI API. ``/v1/models`` lists one model, named ``<run>/<export stage>``. ``/v1/completions``
continues a text: greedily with ``"temperature": 0``, else with the sampling of the export's generation_config.json;
``"stream": true`` streams. ``/v1/chat/completions`` needs a chat template in the tokenizer, which a purely pretrained
model lacks: transformers then answers 500. It rejects requests for other models with 400.

transformers runs without ``--continuous-batching``: in 5.23 the first request's sampling settings would apply to all
later ones, and our first request asks for one greedy token.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace_api.stages.deploy import Engine
from headrace_trainer.errors import UserError
from headrace_trainer.stages.deploy.place import Place

_REMEDIES = {
    Engine.VLLM: "use a runtime whose image has vLLM, or engine transformers",
    Engine.TRANSFORMERS: "install transformers with its extra serving",
}


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model, and the GPUs it gets."""

    name: str
    """The model's id in the API."""
    folder: Path
    """The exported model."""
    dtype: str
    """The weights' data type, as in config.json."""
    num_gpus: int


def engine_command(engine: Engine, program: str, served: Served, place: Place) -> list[str]:
    """The engine's command line.

    Args:
        engine: the engine.
        program: its executable.
        served: the model. transformers finds it by name in its cache, vLLM by folder.
        place: where to listen.
    """
    listen = ["--host", place.host, "--port", str(place.port)]
    if engine is Engine.TRANSFORMERS:
        return [program, "serve", served.name, *listen, "--device", "auto" if served.num_gpus else "cpu"]
    # By default vLLM would serve float32 weights in 16 bits, unlike the model that was evaluated.
    model = [str(served.folder), "--served-model-name", served.name, "--dtype", served.dtype]
    return [program, "serve", *model, *listen, "--tensor-parallel-size", str(max(1, served.num_gpus))]


def engine_environment(inherited: Mapping[str, str], *, home: Path) -> dict[str, str]:
    """The engine's environment: offline, caching only below ``home``, without S3 credentials.

    Args:
        inherited: this process's environment.
        home: a folder for the engine's caches.
    """
    kept = {name: value for name, value in inherited.items() if not name.startswith("AWS_")}
    return kept | {
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(hub_cache(home)),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",  # the CLI checks for updates even when offline
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_CACHE_ROOT": str(home / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
    }


def hub_cache(home: Path) -> Path:
    """Where ``transformers serve`` looks for models."""
    return home / "hub"


def find_program(engine: Engine) -> str:
    """The engine's executable: next to this Python, else on the path.

    Raises:
        UserError: it is not installed.
    """
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(engine.value, path=search)
    if program is None:
        raise UserError(f"deploy.engine: {engine.value!r} is not installed here; {_REMEDIES[engine]}")
    return program
