"""What the cluster shows of a run's attempts: caches of records in, ``Observed`` out.

``watch`` fills the caches, ``apply`` adds what it has just written, ``reconcile`` asks. No I/O here.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Generic, TypeVar

from headrace_api.contract import Progress
from headrace_api.faults import FaultClass, Outcome, classify
from headrace_operator.body.build.service import endpoint
from headrace_operator.body.outcomes import explain_failure, explain_success, last_words
from headrace_operator.body.records import DeploymentRecord, JobRecord, PodRecord, Record
from headrace_operator.brain.observed import Attempt, AttemptState, Held, Observed, Refusal

_LOST_AFTER = timedelta(seconds=30)
"""A pod that outlives the grace period of its deletion by this much is on a node that does not answer."""
_SERVICE_RESTARTS = 3
"""Restarts of a server after which bad configuration is believed to be that."""

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, order=True, slots=True)
class RunKey:
    """The name of a run."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Cache(Generic[R]):
    """The newest record of every object of one kind, by run."""

    def __init__(self) -> None:
        self._by_run: dict[RunKey, dict[str, R]] = defaultdict(dict)
        self._run_of: dict[tuple[str, str], RunKey] = {}

    def __len__(self) -> int:
        return len(self._run_of)

    def put(self, record: R) -> bool:
        """Remember a record; False if a newer one is known, as when a watch lags behind one's own writes."""
        known = self.get(record.namespace, record.name)
        if known is not None and known.uid == record.uid and known.version >= record.version:
            return False
        key = RunKey(record.namespace, record.run)
        self.drop(record.namespace, record.name)
        self._by_run[key][record.name] = record
        self._run_of[record.namespace, record.name] = key
        return True

    def drop(self, namespace: str, name: str) -> RunKey | None:
        """Forget an object; returns the run that it belonged to."""
        key = self._run_of.pop((namespace, name), None)
        if key is not None:
            records = self._by_run[key]
            del records[name]
            if not records:
                del self._by_run[key]
        return key

    def keep_only(self, known: set[tuple[str, str]]) -> list[RunKey]:
        """Forget what a fresh list does not have; returns the runs that it belonged to."""
        gone = [key for key in self._run_of if key not in known]
        return [run for key in gone if (run := self.drop(*key)) is not None]

    def get(self, namespace: str, name: str) -> R | None:
        """One object's record."""
        key = self._run_of.get((namespace, name))
        return self._by_run[key][name] if key is not None else None

    def of_run(self, key: RunKey) -> tuple[R, ...]:
        """The records of a run's objects."""
        return tuple(self._by_run[key].values()) if key in self._by_run else ()


class ProgressBook:
    """The newest report of each attempt. Lost with the process: the next report comes soon."""

    def __init__(self) -> None:
        self._reports: dict[RunKey, dict[tuple[str, int], Progress]] = defaultdict(dict)

    def put(self, key: RunKey, report: Progress) -> None:
        """Remember a report; older attempts of its stage are forgotten."""
        reports = self._reports[key]
        for stage, number in [k for k in reports if k[0] == report.stage and k[1] < report.attempt]:
            del reports[stage, number]
        reports[report.stage, report.attempt] = report

    def get(self, key: RunKey, stage: str, attempt: int) -> Progress | None:
        """The newest report of an attempt."""
        return self._reports[key].get((stage, attempt)) if key in self._reports else None

    def of_run(self, key: RunKey) -> tuple[Progress, ...]:
        """The reports of a run."""
        return tuple(self._reports[key].values()) if key in self._reports else ()

    def forget(self, key: RunKey) -> None:
        """Forget a run."""
        self._reports.pop(key, None)


class RefusalBook:
    """Why attempts could not be started. Lost with the process: the next one tries for itself."""

    def __init__(self) -> None:
        self._refusals: dict[RunKey, dict[str, Refusal]] = {}

    def put(self, key: RunKey, refusal: Refusal) -> bool:
        """Remember a refusal, for each stage the newest; whether that is news."""
        known = self._refusals.setdefault(key, {}).get(refusal.stage)
        self._refusals[key][refusal.stage] = refusal
        news = known is None or known.number != refusal.number
        return news or known is None or known.outcome.reason != refusal.outcome.reason

    def of_run(self, key: RunKey) -> tuple[Refusal, ...]:
        """The refusals of a run."""
        return tuple(self._refusals.get(key, {}).values())

    def forget(self, key: RunKey) -> None:
        """Forget a run."""
        self._refusals.pop(key, None)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Everything known of all runs' children."""

    jobs: Cache[JobRecord] = field(default_factory=Cache)
    deployments: Cache[DeploymentRecord] = field(default_factory=Cache)
    pods: Cache[PodRecord] = field(default_factory=Cache)
    progress: ProgressBook = field(default_factory=ProgressBook)
    refusals: RefusalBook = field(default_factory=RefusalBook)

    def observe(self, key: RunKey, *, run_uid: str, now: datetime) -> Observed:
        """The attempts of a run; objects of an earlier run of the same name are not its."""
        jobs = _by_attempt(self.jobs.of_run(key), run_uid)
        deployments = _by_attempt(self.deployments.of_run(key), run_uid)
        pods = _by_attempt(self.pods.of_run(key), run_uid)
        attempts = [
            _attempt(
                found,
                job=next(iter(jobs.get(found, ())), None),
                deployment=next(iter(deployments.get(found, ())), None),
                pods=pods.get(found, []),
                report=self.progress.get(key, *found),
                now=now,
            )
            for found in sorted({*jobs, *deployments, *pods})
        ]
        known = tuple(a for a in attempts if a is not None)
        return Observed(now=now, attempts=known, refusals=self.refusals.of_run(key))

    def seconds_to_loss(self, key: RunKey, *, now: datetime) -> float | None:
        """When the next pod that will not end is to be given up; nothing else would wake the run for it."""
        waits = [
            (pod.deleted_at + _LOST_AFTER - now).total_seconds()
            for pod in self.pods.of_run(key)
            if pod.deleted_at is not None and not pod.ended
        ]
        return max(1.0, min(waits)) if (waits := [w for w in waits if w > 0]) else None


def _by_attempt(records: Iterable[R], run_uid: str) -> dict[tuple[str, int], list[R]]:
    found: dict[tuple[str, int], list[R]] = defaultdict(list)
    for record in records:
        if record.run_uid == run_uid:
            found[record.stage, record.attempt].append(record)
    return dict(found)


def _attempt(
    key: tuple[str, int],
    *,
    job: JobRecord | None,
    deployment: DeploymentRecord | None,
    pods: Sequence[PodRecord],
    report: Progress | None,
    now: datetime,
) -> Attempt | None:
    """One attempt; None where only the remains of a lost pod are left."""
    stage, number = key
    live = [pod for pod in pods if not pod.ended and not is_lost(pod, now=now)]
    if deployment is not None:
        state, outcome = service_state(deployment, pods)
        report = _service_report(deployment, report)
    elif job is None and not live and not any(pod.ended for pod in pods):
        return None
    else:
        state, outcome = job_state(job, pods, live)
    hashes = [record.hash for record in (job, deployment, *pods) if record is not None]
    return Attempt(
        stage=stage,
        number=number,
        hash=hashes[0],
        state=state,
        outcome=outcome,
        progress=report,
        held=held(pods) if state is AttemptState.PENDING else None,
    )


def held(pods: Sequence[PodRecord]) -> Held | None:
    """What holds an attempt back: rather a pod that may never start than one that waits for a node."""
    found = [pod.held for pod in sorted(pods, key=lambda p: p.index) if pod.held is not None]
    return min(found, key=lambda h: h.since is None, default=None)


def is_lost(pod: PodRecord, *, now: datetime) -> bool:
    """Whether a pod was to be gone by now, and nobody can say whether it is."""
    return pod.deleted_at is not None and now > pod.deleted_at + _LOST_AFTER


def job_state(
    job: JobRecord | None, pods: Sequence[PodRecord], live: Sequence[PodRecord]
) -> tuple[AttemptState, Outcome | None]:
    """Where a task's or a gang's attempt is.

    Args:
        job: its Job; None once that is deleted.
        pods: its pods that still have an object.
        live: those of them that may still do something.
    """
    removed = job is None or job.deleted_at is not None
    failing = (job is not None and job.failed) or any(pod.phase == "Failed" for pod in pods)
    if live and (removed or failing or any(pod.deleted_at is not None for pod in pods)):
        return AttemptState.STOPPING, None
    if failing or (job is not None and any(is_gone(pod) for pod in pods)):
        return AttemptState.FAILED, explain_failure(pods) or classify(None, pod_reason=job.reason if job else "")
    if (job is not None and job.complete) or (removed and pods):
        return AttemptState.SUCCEEDED, explain_success(pods)
    if job is None or job.deleted_at is not None:
        return AttemptState.STOPPING, None
    started = sum(pod.phase in ("Running", "Succeeded") for pod in pods)
    return (AttemptState.RUNNING if started >= job.size else AttemptState.PENDING), None


def is_gone(pod: PodRecord) -> bool:
    """Whether a pod was deleted before it ended: all such pods that are not live are lost ones."""
    return pod.deleted_at is not None and not pod.ended


def service_state(deployment: DeploymentRecord, pods: Sequence[PodRecord]) -> tuple[AttemptState, Outcome | None]:
    """Where a service's attempt is: it fails if its server says that it never can start, or by its deadline."""
    if deployment.deleted_at is not None:
        return AttemptState.STOPPING, None
    if deployment.available_since is not None:
        return AttemptState.RUNNING, None
    ends = [outcome for pod in pods if pod.restarts >= _SERVICE_RESTARTS and (outcome := last_words(pod)) is not None]
    hopeless = next((outcome for outcome in ends if outcome.fault is FaultClass.USER), None)
    if hopeless is not None:
        return AttemptState.FAILED, hopeless
    if deployment.stuck:
        late = Outcome(fault=FaultClass.PROCESS, reason="ProgressDeadlineExceeded", message=deployment.stuck)
        return AttemptState.FAILED, explain_failure(pods) or late
    return AttemptState.PENDING, None


def _service_report(deployment: DeploymentRecord, report: Progress | None) -> Progress | None:
    """A service has an endpoint while its Deployment is available, whatever its pods report."""
    since, stage = deployment.available_since, deployment.stage
    if since is None:
        return report.model_copy(update={"endpoint": None}) if report is not None else None
    address = endpoint(deployment.run, stage, namespace=deployment.namespace, port=deployment.port)
    base = report or Progress(stage=stage, attempt=deployment.attempt, unit="replicas", time=since)
    return base.model_copy(update={"phase": "Serving", "endpoint": address})
