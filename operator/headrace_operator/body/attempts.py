"""A run's attempts, from records of its Kubernetes objects. Pure.

In: records of Jobs, Deployments and pods. Out: ``Attempt`` values for the planner. A pod belongs to the Job or
Deployment that owns it; labels prove nothing, since ``kubectl debug --keep-labels`` copies them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from headrace_api.contract import Progress
from headrace_api.faults import FaultClass, Outcome, classify
from headrace_operator.body.outcomes import ends_of, last_words
from headrace_operator.body.records import DeploymentRecord, JobRecord, PodRecord
from headrace_operator.brain.endings import explain_failure, explain_success
from headrace_operator.brain.observed import Attempt, AttemptState, Held

LOST_AFTER = timedelta(seconds=30)
"""A pod that outlives its deletion grace period by this much is on an unreachable node."""
_SERVICE_RESTARTS = 3
"""Restarts after which a server's configuration error is believed."""


@dataclass(kw_only=True)
class Parts:
    """The objects of one attempt."""

    stage: str
    number: int
    uid: str
    """uid of its Job or Deployment; empty for pods whose Deployment is gone or already at another attempt."""
    job: JobRecord | None = None
    deployment: DeploymentRecord | None = None
    pods: list[PodRecord] = field(default_factory=list)


def attempts_of(
    *,
    jobs: Iterable[JobRecord],
    deployments: Iterable[DeploymentRecord],
    pods: Iterable[PodRecord],
    report: Callable[[str, int], Progress | None],
    run_uid: str,
    now: datetime,
) -> tuple[Attempt, ...]:
    """The attempts of a run.

    Args:
        jobs: the Jobs labelled with its name.
        deployments: the Deployments, likewise.
        pods: the pods, likewise.
        report: looks up the newest report of a stage's attempt.
        run_uid: excludes objects of an earlier run of the same name, and objects owned by anything else.
        now: the current time.
    """
    parts = _sorted_out(tuple(jobs), tuple(deployments), pods, run_uid=run_uid)
    found = (_attempt(p, report(p.stage, p.number), now=now) for p in parts)
    return tuple(a for a in found if a is not None)


def _sorted_out(
    jobs: Sequence[JobRecord], deployments: Sequence[DeploymentRecord], pods: Iterable[PodRecord], *, run_uid: str
) -> Iterator[Parts]:
    """Group the objects by attempt: each pod with the workload that owns it."""
    found: dict[tuple[str, int, str], Parts] = {}

    def of(record: JobRecord | DeploymentRecord | PodRecord, uid: str) -> Parts:
        parts = Parts(stage=record.stage, number=record.attempt, uid=uid)
        return found.setdefault((record.stage, record.attempt, uid), parts)

    strange = {j.uid for j in jobs if j.owner != run_uid}
    by_name = {d.name: d for d in deployments if d.owner == run_uid}
    for job in jobs:
        if job.uid not in strange:
            of(job, job.uid).job = job
    for deployment in by_name.values():
        of(deployment, deployment.uid).deployment = deployment
    for pod in pods:
        if pod.run_uid != run_uid or not pod.owner or pod.owner in strange:
            continue
        if not pod.deployment:
            of(pod, pod.owner).pods.append(pod)
        elif pod.deployment in by_name or not any(d.name == pod.deployment for d in deployments):
            current = by_name.get(pod.deployment)
            of(pod, current.uid if current is not None and current.attempt == pod.attempt else "").pods.append(pod)
    return iter([found[key] for key in sorted(found)])


def _attempt(parts: Parts, report: Progress | None, *, now: datetime) -> Attempt | None:
    """One attempt; None if only a lost pod remains of it."""
    job, deployment, pods = parts.job, parts.deployment, parts.pods
    live = [pod for pod in pods if not pod.ended and not is_lost(pod, now=now)]
    if deployment is not None:
        state, outcome = service_state(deployment, pods)
        report = _service_report(deployment, report)
        holds, lacks = _held_service(deployment, pods), _missing_servers(deployment)
    elif job is None and not live and not any(pod.ended for pod in pods):
        return None
    else:
        state, outcome = job_state(job, pods, live)
        holds, lacks = held(pods), missing(job, pods) if job is not None else ""
    made_for = next(record for record in (job, deployment, *pods) if record is not None)
    return Attempt(
        stage=parts.stage,
        number=parts.number,
        uid=parts.uid,
        hash=made_for.hash,
        digest=made_for.resolved,
        state=state,
        outcome=outcome,
        progress=report,
        held=holds if state is AttemptState.PENDING else None,
        missing=lacks if state is AttemptState.PENDING else "",
    )


def missing(job: JobRecord, pods: Sequence[PodRecord]) -> str:
    """What is missing until all of a Job's pods run. Why pods were not created is only in the Job's events."""
    exist = len({pod.index for pod in pods})
    if exist < job.size:
        return f"{exist} of {job.size} pods exist; see `kubectl describe job {job.name}`"
    return f"{_running(pods)} of {job.size} pods run"


def _running(pods: Sequence[PodRecord]) -> int:
    return len({pod.index for pod in pods if pod.phase in ("Running", "Succeeded")})


def held(pods: Sequence[PodRecord]) -> Held | None:
    """What holds an attempt back. A pod that may never start outranks one that waits for a node."""
    found = [pod.held for pod in sorted(pods, key=lambda p: p.index) if pod.held is not None]
    return min(found, key=lambda h: h.since is None, default=None)


def is_lost(pod: PodRecord, *, now: datetime) -> bool:
    """Whether a pod is overdue for deletion, so that its true state is unknown."""
    return pod.deletion_deadline is not None and now > pod.deletion_deadline + LOST_AFTER


def job_state(
    job: JobRecord | None, pods: Sequence[PodRecord], live: Sequence[PodRecord]
) -> tuple[AttemptState, Outcome | None]:
    """The state of a Job's attempt.

    Args:
        job: the Job; None once deleted.
        pods: its pods that still exist in the API.
        live: those that may still be running.
    """
    removed = job is None or job.deletion_deadline is not None
    failing = (job is not None and job.failed) or any(pod.phase == "Failed" for pod in pods)
    if live and (removed or failing or any(pod.deletion_deadline is not None for pod in pods)):
        return AttemptState.STOPPING, None
    if failing or (job is not None and any(is_gone(pod) for pod in pods)):
        return AttemptState.FAILED, explain_failure(ends_of(pods)) or classify(
            None, pod_reason=job.reason if job else ""
        )
    if (job is not None and job.complete) or (removed and pods):
        return AttemptState.SUCCEEDED, explain_success(ends_of(pods))
    if job is None or job.deletion_deadline is not None:
        return AttemptState.STOPPING, None
    return (AttemptState.RUNNING if _running(pods) >= job.size else AttemptState.PENDING), None


def is_gone(pod: PodRecord) -> bool:
    """Whether a pod is being deleted without having ended. If it is not live either, it is lost."""
    return pod.deletion_deadline is not None and not pod.ended


def is_serving(deployment: DeploymentRecord) -> bool:
    """Whether the newest attempt's servers are available and no older ones remain."""
    return deployment.available_since is not None and deployment.updated > 0 and deployment.old <= 0


def service_state(deployment: DeploymentRecord, pods: Sequence[PodRecord]) -> tuple[AttemptState, Outcome | None]:
    """The state of a Deployment's attempt.

    It fails if its server reports a configuration error or crash-loops past the Deployment's progress deadline. A slow
    start (no room on any node, a large model) is waited for.
    """
    if deployment.deletion_deadline is not None:
        return AttemptState.STOPPING, None
    if is_serving(deployment):
        return AttemptState.RUNNING, None
    ends = [outcome for pod in pods if pod.restarts >= _SERVICE_RESTARTS and (outcome := last_words(pod)) is not None]
    hopeless = next((outcome for outcome in ends if outcome.fault is FaultClass.USER), None)
    if hopeless is not None:
        return AttemptState.FAILED, hopeless
    if deployment.stuck and any(pod.restarts for pod in pods):
        late = Outcome(fault=FaultClass.PROCESS, reason="ProgressDeadlineExceeded", message=deployment.stuck)
        return AttemptState.FAILED, explain_failure(ends_of(pods)) or late
    return AttemptState.PENDING, None


def _held_service(deployment: DeploymentRecord, pods: Sequence[PodRecord]) -> Held | None:
    by_pods = held(pods)
    if by_pods is not None:
        return by_pods
    if deployment.refused:
        return Held(reason="FailedCreate", message=deployment.refused)
    return Held(reason="ProgressDeadlineExceeded", message=deployment.stuck) if deployment.stuck else None


def _missing_servers(deployment: DeploymentRecord) -> str:
    made = f"{deployment.updated} of {deployment.size} servers created"
    return f"{made}; {deployment.old} of an earlier attempt still running" if deployment.old > 0 else made


def _service_report(deployment: DeploymentRecord, report: Progress | None) -> Progress | None:
    """The report, with an endpoint exactly while the attempt's own servers are available."""
    if deployment.available_since is None or not is_serving(deployment):
        return report.model_copy(update={"endpoint": None}) if report is not None else None
    address = f"http://{deployment.name}.{deployment.namespace}.svc:{deployment.port}"
    base = report or Progress(
        stage=deployment.stage, attempt=deployment.attempt, unit="replicas", time=deployment.available_since
    )
    return base.model_copy(update={"phase": "Serving", "endpoint": address})
