"""Where a server listens, and the address that clients use. Pure."""

from dataclasses import dataclass

from headrace_api.contract import ResolvedStage, service_name
from headrace_trainer.stages.deploy.port import LOOPBACK


@dataclass(frozen=True, kw_only=True)
class Place:
    """Both sides of an address."""

    host: str
    """The interface that the engine binds to."""
    port: int
    endpoint: str
    """Where clients reach it."""

    @property
    def local(self) -> str:
        """The address within this machine or pod."""
        return f"http://{LOOPBACK}:{self.port}"


def local_place(port: int) -> Place:
    """Listen on loopback only."""
    return Place(host=LOOPBACK, port=port, endpoint=f"http://{LOOPBACK}:{port}")


def cluster_place(resolved: ResolvedStage, *, port: int) -> Place:
    """Listen in a pod, behind the stage's Service."""
    service = service_name(resolved.run, resolved.stage.name)
    return Place(host="0.0.0.0", port=port, endpoint=f"http://{service}.{resolved.namespace}.svc:{port}")
