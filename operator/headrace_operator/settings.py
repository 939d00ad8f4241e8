"""Settings from the environment, as set by the chart."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from headrace_api.contract import PROGRESS_PATH


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where and how the operator runs."""

    namespace: str
    """The operator's own namespace, which holds the Lease."""
    pod: str | None
    """Its pod's name; None outside a cluster."""
    identity: str
    """Its name in the Lease."""
    lease: str
    host: str
    port: int
    progress_url: str
    """The URL at which pods reach ``port``."""
    workers: int
    """How many runs are reconciled concurrently."""
    log_level: str
    log_format: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings from environment variables.

        Raises:
            ValueError: names the variable, its value and the remedy.
        """
        port = _number(environment, "HEADRACE_PORT", 8080, at_most=65535)
        pod = environment.get("POD_NAME")
        return cls(
            namespace=environment.get("POD_NAMESPACE", "default"),
            pod=pod,
            identity=pod or f"{socket.gethostname()}-{os.getpid()}",
            lease=environment.get("HEADRACE_LEASE", "headrace-operator"),
            host=environment.get("HEADRACE_HOST", "0.0.0.0"),
            port=port,
            progress_url=environment.get(
                "HEADRACE_PROGRESS_URL", f"http://{socket.gethostname()}:{port}{PROGRESS_PATH}"
            ),
            workers=_number(environment, "HEADRACE_WORKERS", 8, at_most=256),
            log_level=_choice(environment, "HEADRACE_LOG_LEVEL", ("info", "debug", "warning", "error")),
            log_format=_choice(environment, "HEADRACE_LOG_FORMAT", ("text", "json")),
        )


def _number(environment: Mapping[str, str], name: str, default: int, *, at_most: int) -> int:
    value = environment.get(name, str(default))
    if not value.isdigit() or not 1 <= int(value) <= at_most:
        raise ValueError(f"{name}: {value!r}: set a whole number from 1 to {at_most}")
    return int(value)


def _choice(environment: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    value = environment.get(name, choices[0]).lower()
    if value not in choices:
        raise ValueError(f"{name}: {value!r}: choose one of {', '.join(choices)}")
    return value
