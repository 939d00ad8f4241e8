"""The agent's settings, passed by the body through the environment."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One pod's place in the gang, and where it writes."""

    scratch: Path
    """A folder on this node for this attempt alone; emptied at the start, removed at the end."""
    termination_file: Path
    index: int
    """The pod's completion index."""
    master_addr: str
    master_port: int
    node: str
    grace_seconds: float
    """Time from the stop request to SIGKILL; less than the pod's grace period."""
    metrics_port: int | None
    token_file: Path | None
    """A projected token for the progress endpoint."""

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "Settings":
        """Read ``HEADRACE_*`` and ``JOB_COMPLETION_INDEX``."""
        port, token = env.get("HEADRACE_METRICS_PORT"), env.get("HEADRACE_PROGRESS_TOKEN_FILE")
        return cls(
            scratch=Path(env.get("HEADRACE_SCRATCH", "/tmp/headrace")),
            termination_file=Path(env.get("HEADRACE_TERMINATION_FILE", "/dev/termination-log")),
            index=int(env.get("JOB_COMPLETION_INDEX", "0")),
            master_addr=env.get("HEADRACE_MASTER_ADDR", "127.0.0.1"),
            master_port=int(env.get("HEADRACE_MASTER_PORT", "29400")),
            node=env.get("HEADRACE_NODE_NAME", socket.gethostname()),
            grace_seconds=float(env.get("HEADRACE_GRACE_SECONDS", "100")),
            metrics_port=int(port) if port else None,
            token_file=Path(token) if token else None,
        )


def default_threads(ranks: int) -> int:
    """OpenMP threads per rank, so that a pod's ranks share its cores."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)
