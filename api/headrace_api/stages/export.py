"""The export stage: a Megatron checkpoint -> the Hugging Face folder that transformers and vLLM load."""

from enum import StrEnum
from typing import ClassVar

from pydantic import Field

from headrace_api.base import Line
from headrace_api.stages.base import ArtifactKind, Inputs, RunsAs, StageConfig, StageName


class ExportDtype(StrEnum):
    """The number format of the exported weights."""

    FP32 = "fp32"
    BF16 = "bf16"


class ExportInputs(Inputs):
    """What is exported."""

    ACCEPTS: ClassVar[dict[str, ArtifactKind]] = {"model": ArtifactKind.CHECKPOINT}

    model: StageName
    """model names the stage that trained the model."""


class Export(StageConfig):
    """Write safetensors, the tokenizer, a generation configuration and a model card."""

    KIND = "export"
    GIVES = ArtifactKind.HUGGINGFACE
    RUNS_AS = RunsAs.TASKS

    from_: ExportInputs = Field(alias="from")
    """from names the model."""
    dtype: ExportDtype = ExportDtype.FP32
    """dtype is the number format of the weights."""
    license: Line = Field("unknown", max_length=64)
    """license is the SPDX identifier that the model card states."""
