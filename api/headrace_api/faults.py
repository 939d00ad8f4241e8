"""The fault table: exit codes and pod conditions -> a fault class; a class -> the budget it costs.

The trainer exits with these codes and writes an ``Outcome`` as its termination message. The operator and the local body
use ``classify``; ``plan`` decides.
"""

from collections.abc import Iterable
from enum import IntEnum, StrEnum

from headrace_api.base import Figures, Spec


class ExitCode(IntEnum):
    """A pod's exit code. It stands in for a lost termination message."""

    OK = 0
    USER = 2
    """Bad configuration or data; a retry would fail the same way."""
    PROCESS = 70
    """A rank died or a collective failed, with no sign of a bad node (EX_SOFTWARE)."""
    STORAGE = 74
    """Storage did not answer or returned corrupt data (EX_IOERR)."""
    STOPPED = 75
    """Stopped on request, with the work saved (EX_TEMPFAIL)."""


class FaultClass(StrEnum):
    """The kind of fault; determines the remedy and the budget."""

    USER = "user"
    PROCESS = "process"
    STALL = "stall"
    POD = "pod"
    STORAGE = "storage"
    STOPPED = "stopped"
    CAPACITY = "capacity"
    """Not a failure, but no room at the moment: an exhausted quota, or a name that is taken."""


class Budget(StrEnum):
    """The retry budget that a fault is charged to."""

    USER = "user"
    INFRA = "infra"


BUDGETS: dict[FaultClass, Budget] = {
    FaultClass.USER: Budget.USER,
    FaultClass.PROCESS: Budget.INFRA,
    FaultClass.STALL: Budget.INFRA,
    FaultClass.POD: Budget.INFRA,
    FaultClass.STORAGE: Budget.INFRA,
    FaultClass.STOPPED: Budget.INFRA,
}
"""The budget of each fault class. CAPACITY is waited for instead; a requested stop is not a failure."""

_EXIT_CODES: dict[int, FaultClass] = {
    ExitCode.USER: FaultClass.USER,
    ExitCode.PROCESS: FaultClass.PROCESS,
    ExitCode.STORAGE: FaultClass.STORAGE,
    ExitCode.STOPPED: FaultClass.STOPPED,
}


class Outcome(Spec):
    """How an attempt ended: the pod's termination message. Unknown fields are ignored."""

    model_config = Spec.model_config | {"extra": "ignore"}

    fault: FaultClass | None = None
    """fault is the class of the failure; unset after success."""
    reason: str = "Succeeded"
    """reason is one CamelCase word for conditions and metrics."""
    message: str = ""
    """message is for people: the field or file, the value, the remedy."""
    step: int | None = None
    """step is the last finished step."""
    rank: int | None = None
    """rank is the rank that failed first."""
    node: str | None = None
    """node is where the pod ran."""
    artifact_digest: str | None = None
    """artifactDigest is the digest of the artifact that a successful attempt produced."""
    metrics: Figures = {}
    """metrics are the stage's final metrics, without non-finite ones."""


def classify(exit_code: int | None, *, pod_reason: str = "") -> Outcome:
    """The outcome of a pod without a termination message.

    Args:
        exit_code: the container's exit code; None if the pod vanished before it had one.
        pod_reason: Kubernetes' reason, such as Evicted or OOMKilled.
    """
    if exit_code == ExitCode.OK:
        return Outcome()
    fault = FaultClass.POD if exit_code is None or exit_code >= 128 else _EXIT_CODES.get(exit_code, FaultClass.PROCESS)
    said = pod_reason or ("Vanished" if exit_code is None else "ExitCode")
    detail = "the pod is gone" if exit_code is None else f"exit code {exit_code}"
    return Outcome(fault=fault, reason=said, message=f"{detail}, without a termination message")


_MOST_TELLING = (
    FaultClass.USER,
    FaultClass.STORAGE,
    FaultClass.STOPPED,
    FaultClass.POD,
    FaultClass.CAPACITY,
    FaultClass.STALL,
    FaultClass.PROCESS,
)
"""Root causes first: when one rank reads bad data, hangs or loses its pod, its peers only wait or lose connections."""


def most_telling(outcomes: Iterable[Outcome]) -> Outcome | None:
    """The failure that explains the others: the first of the most telling class. None if nothing failed.

    Args:
        outcomes: of a pod's ranks, or of a gang's pods, earliest first.
    """
    faults = [(fault, o) for o in outcomes if (fault := o.fault) is not None]
    return min(faults, key=lambda f: _MOST_TELLING.index(f[0]), default=(None, None))[1]
