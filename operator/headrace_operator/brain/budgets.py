"""What failures cost a stage, and what gives it back. Pure.

``infraSpent`` and ``userSpent`` of a stage's status are held against ``restartPolicy``; ``infraRestarts`` and
``userRestarts`` count for people, and are never given back.
"""

from headrace_api.faults import BUDGETS, Budget, FaultClass, Outcome
from headrace_api.run import RestartPolicy, StageStatus
from headrace_operator.brain.backoff import backoff_seconds
from headrace_operator.brain.observed import Attempt

LONGEST_WAIT_SECONDS = 60.0
_FIRST_WAIT_SECONDS = 2.0


def charge(status: StageStatus, outcome: Outcome, *, policy: RestartPolicy) -> tuple[StageStatus, bool]:
    """Charge a failure to its budget.

    Returns:
        The status with the failure counted and described, and whether the budget allows another attempt.
    """
    if BUDGETS.get(outcome.fault or FaultClass.PROCESS, Budget.INFRA) is Budget.USER:
        within = status.user_spent < policy.max_user_restarts
        counted = {"user_spent": status.user_spent + within, "user_restarts": status.user_restarts + within}
    else:
        within = status.infra_spent < policy.max_infra_restarts
        counted = {"infra_spent": status.infra_spent + within, "infra_restarts": status.infra_restarts + within}
    said = {"reason": outcome.reason, "message": outcome.message}
    return status.model_copy(update={**said, **counted, "outcome_due_at": None}), within


def wait_seconds(status: StageStatus) -> float:
    """How long the next attempt waits: not at all after a first failure, then twice as long each time."""
    failures = status.infra_spent + status.user_spent
    return backoff_seconds(failures - 1, first_seconds=_FIRST_WAIT_SECONDS, longest_seconds=LONGEST_WAIT_SECONDS)


def with_fresh_budgets(status: StageStatus) -> StageStatus:
    """The status with nothing spent."""
    return status.model_copy(update={"infra_spent": 0, "user_spent": 0})


def step_of(attempt: Attempt | None) -> int:
    """The step that an attempt has reported; 0 where something else is counted."""
    progress = attempt.progress if attempt is not None else None
    return progress.done if progress is not None and progress.unit == "steps" else 0


def has_advanced(status: StageStatus, *, step: int, policy: RestartPolicy) -> bool:
    """Whether a step is far enough past the furthest one that failed: going over old ground again is no progress."""
    return step >= status.failed_step + policy.reset_after_steps
