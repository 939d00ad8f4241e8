"""What the cluster shows of a run's attempts: caches of records in, ``Observed`` out.

``watch`` fills the caches, ``apply`` adds what it has just written, ``reconcile`` asks. No I/O here.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, TypeVar

from headrace_api.contract import Progress
from headrace_operator.body.attempts import LOST_AFTER, attempts_of
from headrace_operator.body.records import DeploymentRecord, JobRecord, PodRecord, Record
from headrace_operator.brain.observed import Observed, Refusal

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
    """Why attempts could not be started, by the uid of their run. Lost with the process: the next one tries for itself."""

    def __init__(self) -> None:
        self._refusals: dict[str, dict[str, Refusal]] = {}

    def put(self, run_uid: str, refusal: Refusal) -> bool:
        """Remember a refusal, for each stage the newest; whether it is another one than before."""
        of_run = self._refusals.setdefault(run_uid, {})
        known, of_run[refusal.stage] = of_run.get(refusal.stage), refusal
        return known is None or (known.number, known.outcome.reason) != (refusal.number, refusal.outcome.reason)

    def of_run(self, run_uid: str) -> tuple[Refusal, ...]:
        """The refusals of a run."""
        return tuple(self._refusals.get(run_uid, {}).values())

    def forget(self, run_uid: str) -> None:
        """Forget a run."""
        self._refusals.pop(run_uid, None)


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
        attempts = attempts_of(
            jobs=self.jobs.of_run(key),
            deployments=self.deployments.of_run(key),
            pods=self.pods.of_run(key),
            report=lambda stage, number: self.progress.get(key, stage, number),
            run_uid=run_uid,
            now=now,
        )
        return Observed(now=now, attempts=attempts, refusals=self.refusals.of_run(run_uid))

    def seconds_to_loss(self, key: RunKey, *, now: datetime) -> float | None:
        """When the next pod that will not end is to be given up; nothing else would wake the run for it."""
        waits = [
            (pod.deleted_at + LOST_AFTER - now).total_seconds()
            for pod in self.pods.of_run(key)
            if pod.deleted_at is not None and not pod.ended
        ]
        return max(1.0, min(waits)) if (waits := [w for w in waits if w > 0]) else None
