"""What Kubernetes says of ends and refusals, in the planner's words. Pure.

In: records of pods, errors of the API server. Out: ``Outcome`` and ``End`` values, among which the planner's room chooses.
"""

from collections.abc import Iterable

from pydantic import ValidationError

from headrace_api.faults import FaultClass, Outcome, classify
from headrace_operator.body.kube import ApiError
from headrace_operator.body.queue import Retry
from headrace_operator.body.records import PodRecord
from headrace_operator.brain.endings import End

_NEVER_MAY = frozenset({400, 403, 413, 422})
"""HTTP statuses of a server that has understood, and will say the same again."""


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


def ends_of(pods: Iterable[PodRecord]) -> list[End]:
    """How those pods ended that have."""
    return [
        End(outcome=outcome, index=pod.index, at=pod.finished_at, taken=bool(pod.disruption))
        for pod in pods
        if (outcome := last_words(pod)) is not None
    ]


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
