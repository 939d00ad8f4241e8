"""The deploy stage: an exported model -> an OpenAI-compatible endpoint, ready once it has answered a completion."""

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field

from headrace_api.base import Part
from headrace_api.stages.base import ArtifactKind, Inputs, RunsAs, StageConfig, StageName


class Engine(StrEnum):
    """The serving program."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class DeployInputs(Inputs):
    """What is served."""

    ACCEPTS: ClassVar[dict[str, ArtifactKind]] = {"model": ArtifactKind.HUGGINGFACE}

    model: StageName
    """model names the export stage."""


class Deploy(StageConfig):
    """Serve an exported model over HTTP."""

    KIND = "deploy"
    GIVES = ArtifactKind.ENDPOINT
    RUNS_AS = RunsAs.SERVICE

    from_: DeployInputs = Field(alias="from")
    """from names the exported model."""
    engine: Engine = Engine.TRANSFORMERS
    """engine is the server: transformers runs on CPUs, vllm on GPU pools."""
    replicas: Annotated[int, Part.EXECUTION] = Field(1, ge=1, le=1000)
    """replicas is the initial number of servers. A change is applied in place; an autoscaler's choice is kept. A local run has one."""
    port: int = Field(8000, ge=1024, le=65535)
    """port is where the endpoint listens; a local run uses the next free port."""
