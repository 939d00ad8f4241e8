"""Which of an attempt's pods explains how it ended, and what a refused start means. Pure.

In: the records of its pods. Out: one ``Outcome``. One fault of a gang makes many: peers lose their connections, the
Job ends what is left. The explanation is the worst fault, and among equals the first.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from pydantic import ValidationError

from headrace_api.faults import FaultClass, Outcome, classify
from headrace_operator.body.kube import ApiError
from headrace_operator.body.queue import Retry
from headrace_operator.body.records import PodRecord

_NEVER = datetime.max.replace(tzinfo=UTC)


def last_words(pod: PodRecord) -> Outcome | None:
    """What a pod says of its end; None while it has not ended."""
    try:
        said = Outcome.model_validate_json(pod.last_words) if pod.last_words else None
    except ValidationError:
        said = None
    if said is None and pod.exit_code is None and not pod.disruption:
        return None
    outcome = said if said is not None else classify(pod.exit_code, pod_reason=pod.disruption)
    return outcome if outcome.node is not None else outcome.model_copy(update={"node": pod.node})


def explain_failure(pods: Sequence[PodRecord]) -> Outcome | None:
    """The outcome of a failed attempt; None if no pod is left that says anything."""
    ends = [(pod, outcome) for pod in pods if (outcome := last_words(pod)) is not None and outcome.fault is not None]
    if not ends:
        return None
    return min(ends, key=lambda end: (_weight(*end), end[0].finished_at or _NEVER, end[0].index))[1]


def explain_success(pods: Sequence[PodRecord]) -> Outcome | None:
    """The outcome of an attempt that succeeded: what the pod says that wrote the artifact."""
    ends = [(pod, outcome) for pod in pods if (outcome := last_words(pod)) is not None and outcome.fault is None]
    if not ends:
        return None
    return min(ends, key=lambda end: (end[1].artifact_digest is None, end[0].index))[1]


def _weight(pod: PodRecord, outcome: Outcome) -> int:
    """Lower explains more. Bad data and dead storage say so themselves; after that a pod that was taken from outside,
    for the others then fail of its absence."""
    if outcome.fault is FaultClass.USER:
        return 0
    if outcome.fault is FaultClass.STORAGE:
        return 1
    return 2 if pod.disruption else 3


_NEVER_MAY = frozenset({400, 403, 413, 422})
"""HTTP statuses of a server that has understood, and will say the same again."""


class NameTaken(Retry):
    """An object of that name exists, and is somebody else's."""


def refusal_of(error: ApiError | Retry) -> Outcome | None:
    """What it means that an attempt's object was refused; None if the same request may be taken the next time.

    A quota is waited for, and so is a name that is taken, and the operator's own permission, which is no fault of the
    run's. What admission or validation refuses is a failure of the attempt.
    """
    if isinstance(error, NameTaken):
        return Outcome(fault=FaultClass.CAPACITY, reason="NameTaken", message=str(error))
    if isinstance(error, Retry) or error.status not in _NEVER_MAY:
        return None
    if "exceeded quota" in error.message:
        return Outcome(fault=FaultClass.CAPACITY, reason="QuotaExceeded", message=error.message)
    if error.status == 403 and "cannot create resource" in error.message:
        return Outcome(fault=FaultClass.CAPACITY, reason="OperatorForbidden", message=error.message)
    return Outcome(fault=FaultClass.POD, reason="StartRefused", message=str(error))
