"""Translate Kubernetes' exit states and refusals into the planner's terms. Pure.

In: pod records and API errors. Out: ``Outcome`` and ``End`` values for the planner to choose from.
"""

from collections.abc import Iterable

from pydantic import ValidationError

from headrace_api.faults import FaultClass, Outcome, classify
from headrace_operator.body.kube import ApiError
from headrace_operator.body.queue import Retry
from headrace_operator.body.records import PodRecord
from headrace_operator.brain.endings import End

_NEVER_MAY = frozenset({400, 403, 413, 422})
"""HTTP statuses that the same request would get again."""


def last_words(pod: PodRecord) -> Outcome | None:
    """The pod's outcome: its termination message, else its exit code or disruption. None while it has not ended."""
    try:
        said = Outcome.model_validate_json(pod.last_words) if pod.last_words else None
    except ValidationError:
        said = None
    if said is None and pod.exit_code is None and not pod.disruption:
        return None
    outcome = said if said is not None else classify(pod.exit_code, pod_reason=pod.disruption)
    return outcome if outcome.node is not None else outcome.model_copy(update={"node": pod.node})


def ends_of(pods: Iterable[PodRecord]) -> list[End]:
    """How the pods ended, for those that have."""
    return [
        End(outcome=outcome, index=pod.index, at=pod.finished_at, taken=bool(pod.disruption))
        for pod in pods
        if (outcome := last_words(pod)) is not None
    ]


class NameTaken(Retry):
    """An object of that name exists and has another owner."""


def refusal_of(error: ApiError | Retry) -> Outcome | None:
    """What a refused start means for the attempt; None if a plain retry may succeed.

    Quota, a taken name and missing operator permissions are waited for: none is the run's fault. A rejection by
    admission or validation fails the attempt.
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
