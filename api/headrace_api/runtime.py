"""TrainingRuntime: what platform engineers own: images, and a template for every pod.

Users name a runtime; they cannot change it.
"""

from typing import Any, Literal

from pydantic import Field

from headrace_api.base import MOST, Quantity, Spec
from headrace_api.run import ObjectMeta


class Pool(Spec):
    """Image and template of a class of pods."""

    image: str = Field(max_length=512)
    """image is the trainer's container image."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """imagePullPolicy is the container's imagePullPolicy."""
    python: str = Field("python", max_length=512)
    """python is the image's interpreter that has headrace installed."""
    gpu_memory: Quantity | None = Field(None, ge=1, le=MOST)
    """gpuMemory is the memory of one GPU in the pool, such as 80Gi; a stage whose weights, gradients and optimizer state cannot fit is rejected."""
    cache: dict[str, Any] = Field(
        default_factory=dict, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}
    )
    """cache is a volume that outlives pods, such as {hostPath: {path: /var/cache/headrace}} or {persistentVolumeClaim: {claimName: cache}}, so that each node fetches and verifies inputs once."""
    pod_template: dict[str, Any] = Field(
        default_factory=dict, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}
    )
    """podTemplate is merged into every pod: node selectors, tolerations, volumes, environment. The container is named trainer; lists merge by name, volume mounts by mountPath."""


class RuntimeSpec(Spec):
    """Images and pod templates."""

    trainer: Pool
    """trainer is the image and pod template of every stage."""


class TrainingRuntime(Spec):
    """A cluster-scoped object owned by platform engineers."""

    api_version: Literal["headrace.dev/v1alpha1"] = "headrace.dev/v1alpha1"
    """apiVersion is headrace.dev/v1alpha1."""
    kind: Literal["TrainingRuntime"] = "TrainingRuntime"
    """kind is TrainingRuntime."""
    metadata: ObjectMeta
    """metadata is standard Kubernetes object metadata."""
    spec: RuntimeSpec
    """spec holds the images and pod templates."""
