"""The one table of faults: exit codes and what Kubernetes says of a pod -> a class; a class -> the budget it costs.

The trainer exits with these codes and writes an ``Outcome`` as its termination message; the operator and the local
body classify with ``classify`` and ``plan`` decides.
"""

from collections.abc import Iterable
from enum import IntEnum, StrEnum

from headrace_api.base import Figures, Spec


class ExitCode(IntEnum):
    """What a pod's exit code says when its termination message was lost."""

    OK = 0
    USER = 2
    """Bad configuration or bad data; running it again gives the same."""
    PROCESS = 70
    """A rank died or a collective failed, with no sign of a bad node (EX_SOFTWARE)."""
    STORAGE = 74
    """Storage did not answer or gave corrupt data (EX_IOERR)."""
    STOPPED = 75
    """Asked to stop, and stopped with its work saved (EX_TEMPFAIL)."""


class FaultClass(StrEnum):
    """What kind of thing went wrong; the remedy and the budget follow from it."""

    USER = "user"
    PROCESS = "process"
    STALL = "stall"
    POD = "pod"
    STORAGE = "storage"
    STOPPED = "stopped"
    CAPACITY = "capacity"
    """Nothing is wrong, but there is no room now: a quota is used up, or a name is taken."""


class Budget(StrEnum):
    """Which of the run's two budgets a fault is charged to."""

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
"""What a failure is charged to. CAPACITY is waited for instead; a stop that was asked for is not a failure."""

_EXIT_CODES: dict[int, FaultClass] = {
    ExitCode.USER: FaultClass.USER,
    ExitCode.PROCESS: FaultClass.PROCESS,
    ExitCode.STORAGE: FaultClass.STORAGE,
    ExitCode.STOPPED: FaultClass.STOPPED,
}


class Outcome(Spec):
    """What an attempt says at its end: the pod's termination message. Fields of a newer trainer are passed over."""

    model_config = Spec.model_config | {"extra": "ignore"}

    fault: FaultClass | None = None
    """fault is the class of what went wrong; unset after success."""
    reason: str = "Succeeded"
    """reason is one CamelCase word for conditions and metrics."""
    message: str = ""
    """message is for people: the field or file, the value, the remedy."""
    step: int | None = None
    """step is the last finished step."""
    rank: int | None = None
    """rank is the one that failed first."""
    node: str | None = None
    """node is where the pod ran."""
    artifact_digest: str | None = None
    """artifactDigest is the digest of the artifact that a successful attempt left."""
    metrics: Figures = {}
    """metrics are the figures that the stage ends with; those that are not finite are left out."""


def classify(exit_code: int | None, *, pod_reason: str = "") -> Outcome:
    """The outcome of a pod that left no termination message.

    Args:
        exit_code: the container's exit code; None where the pod vanished before it had one.
        pod_reason: what Kubernetes says of the pod, as Evicted or OOMKilled.
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
"""When one rank reads bad data, hangs, or loses its pod, the others only wait, or see a closed connection."""


def most_telling(outcomes: Iterable[Outcome]) -> Outcome | None:
    """The failure that explains the others: the first of the most telling class; None if nothing failed.

    Args:
        outcomes: of the ranks of a pod, or of the pods of a gang, the earliest first.
    """
    faults = [(fault, o) for o in outcomes if (fault := o.fault) is not None]
    return min(faults, key=lambda f: _MOST_TELLING.index(f[0]), default=(None, None))[1]
