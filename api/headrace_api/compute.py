"""The compute resources of a stage: pods, GPUs, processes."""

import re
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from headrace_api.base import MOST, FieldError, Matches, Quantity, Spec, api_rules, rule

_CORES = r"^([0-9]{1,6}(\.[0-9]{1,3})?|[0-9]{1,9}m)$"
_CORES_REMEDY = "write a number of CPUs above 0, such as 4, 0.5 or 500m"


def _cores(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and not (Matches(_CORES, _CORES_REMEDY).check(value) and re.search("[1-9]", value)):
        raise ValueError(_CORES_REMEDY)
    return value


Cores = Annotated[
    str,
    BeforeValidator(_cores),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "pattern": _CORES,
            "maxLength": 16,
            "x-kubernetes-validations": [
                rule("type(self) == int ? self >= 1 && self < 1000000 : self.matches('[1-9]')", _CORES_REMEDY)
            ],
        }
    ),
]
"""A number of CPUs in Kubernetes notation."""


class Compute(Spec):
    """The compute resources of a stage."""

    model_config = api_rules(
        rule(
            "self.gpusPerNode == 0 || !has(self.ranksPerNode) || self.ranksPerNode <= self.gpusPerNode",
            "ranksPerNode must be at most gpusPerNode: each rank needs its own GPU",
        )
    )

    nodes: int = Field(1, ge=1, le=20_000)
    """nodes is the number of pods, one per node."""
    gpus_per_node: int = Field(0, ge=0, le=16)
    """gpusPerNode is the number of GPUs per pod; 0 trains on CPUs."""
    ranks_per_node: int | None = Field(None, ge=1, le=256)
    """ranksPerNode is the number of processes per pod; defaults to gpusPerNode, or to 1 on CPUs."""
    cpu: Cores | None = None
    """cpu is the CPU request of each pod, such as 4 or 500m."""
    memory: Quantity | None = Field(None, ge=1, le=MOST)
    """memory is the memory request and limit of each pod, such as 16Gi."""

    @model_validator(mode="after")
    def _one_gpu_each(self) -> Self:
        if self.ranks_per_node is not None and 0 < self.gpus_per_node < self.ranks_per_node:
            raise FieldError(
                "ranksPerNode",
                self.ranks_per_node,
                f"must be at most gpusPerNode, {self.gpus_per_node}: each rank needs its own GPU",
            )
        return self

    @property
    def ranks(self) -> int:
        """Processes per pod."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def world(self) -> int:
        """Processes in the gang."""
        return self.nodes * self.ranks

    @property
    def ranks_field(self) -> str:
        """The field that determines the number of processes per pod."""
        return "gpusPerNode" if self.ranks_per_node is None else "ranksPerNode"


def cel_world(stage: str) -> str:
    """``Compute.world`` of a stage in CEL."""
    compute = f"{stage}.compute"
    by_gpus = f"({compute}.gpusPerNode > 0 ? {compute}.gpusPerNode : 1)"
    return f"({compute}.nodes * (has({compute}.ranksPerNode) ? {compute}.ranksPerNode : {by_gpus}))"
