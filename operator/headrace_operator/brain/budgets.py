"""Retry budgets: what a failure costs a stage, and what resets the budget. Pure.

``infraSpent`` and ``userSpent`` in a stage's status count against ``restartPolicy``. ``infraRestarts`` and
``userRestarts`` are totals for people and never reset.
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
    if BUDGETS.get(outcome.fault or FaultClass.PROCESS) is Budget.USER:
        within = status.user_spent < policy.max_user_restarts
        counted = {"user_spent": status.user_spent + within, "user_restarts": status.user_restarts + within}
    else:
        within = status.infra_spent < policy.max_infra_restarts
        counted = {"infra_spent": status.infra_spent + within, "infra_restarts": status.infra_restarts + within}
    said = {"reason": outcome.reason, "message": outcome.message}
    return status.model_copy(update={**said, **counted, "outcome_due_at": None}), within


def wait_seconds(status: StageStatus) -> float:
    """The back-off before the next attempt. The first failure retries at once."""
    failures = status.infra_spent + status.user_spent
    return backoff_seconds(failures - 1, first_seconds=_FIRST_WAIT_SECONDS, longest_seconds=LONGEST_WAIT_SECONDS)


def with_fresh_budgets(status: StageStatus) -> StageStatus:
    """The status with its retry budgets reset."""
    return status.model_copy(update={"infra_spent": 0, "user_spent": 0})


def step_of(attempt: Attempt | None) -> int:
    """The last step that an attempt reported; 0 if it does not count steps."""
    progress = attempt.progress if attempt is not None else None
    return progress.done if progress is not None and progress.unit == "steps" else 0


def has_advanced(status: StageStatus, *, step: int, policy: RestartPolicy) -> bool:
    """Whether ``step`` is far enough past the last failed one to reset the budgets. Replayed steps do not count."""
    return step >= status.failed_step + policy.reset_after_steps
