"""TrainingRuntime: what platform engineers own. Images, and a pod template that is laid under every pod.

Users name a runtime; they cannot change what is in it.
"""

from typing import Any, Literal

from pydantic import Field

from headrace_api.base import MOST, Quantity, Spec
from headrace_api.run import ObjectMeta


class Pool(Spec):
    """Which pods a template is for, and what is laid under them."""

    image: str = Field(max_length=512)
    """image is the trainer's container image."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """imagePullPolicy is the container's imagePullPolicy."""
    python: str = Field("python", max_length=512)
    """python is the interpreter in the image that has headrace installed."""
    gpu_memory: Quantity | None = Field(None, ge=1, le=MOST)
    """gpuMemory is the memory of one GPU of the pool, as 80Gi; a stage whose weights, gradients and optimizer cannot fit is refused."""
    cache: dict[str, Any] = Field(
        default_factory=dict, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}
    )
    """cache is a volume that outlives pods, as {hostPath: {path: /var/cache/headrace}} or {persistentVolumeClaim: {claimName: cache}}: inputs are fetched and verified once a node."""
    pod_template: dict[str, Any] = Field(
        default_factory=dict, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}
    )
    """podTemplate is merged into every pod: node selectors, tolerations, volumes, environment. The container is named trainer; lists merge by name, volume mounts by mountPath."""


class RuntimeSpec(Spec):
    """Images and pod templates."""

    trainer: Pool
    """trainer is the image and template of every stage."""


class TrainingRuntime(Spec):
    """A cluster-scoped object that platform engineers own."""

    api_version: Literal["headrace.dev/v1alpha1"] = "headrace.dev/v1alpha1"
    """apiVersion is headrace.dev/v1alpha1."""
    kind: Literal["TrainingRuntime"] = "TrainingRuntime"
    """kind is TrainingRuntime."""
    metadata: ObjectMeta
    """metadata is a Kubernetes object's."""
    spec: RuntimeSpec
    """spec is the images and pod templates."""
