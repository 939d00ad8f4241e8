"""Caches of records in, ``Observed`` out. No I/O.

``watch`` fills the caches, ``apply`` adds what it has just written, ``reconcile`` reads them.
"""

from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, TypeVar

from headrace_api.contract import Progress
from headrace_operator.body.attempts import LOST_AFTER, attempts_of
from headrace_operator.body.records import DeploymentRecord, JobRecord, PodRecord, Record
from headrace_operator.body.store import Entry, Store
from headrace_operator.brain.observed import Observed, Refusal

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, order=True, slots=True)
class RunKey:
    """Namespace and name of a run."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Cache(Generic[R]):
    """The newest record of every object of one kind, indexed by run."""

    def __init__(self) -> None:
        self._store: Store[tuple[str, str], R] = Store()
        self._by_run: dict[RunKey, dict[str, R]] = defaultdict(dict)

    def __len__(self) -> int:
        return len(self._store)

    def put(self, record: R) -> bool:
        """Store a record; False if it is stale, as when a watch lags behind our own writes."""
        name = (record.namespace, record.name)
        before = self._store.get(name)
        if not self._store.put(name, Entry(uid=record.uid, version=record.version, value=record)):
            return False
        if before is not None:
            self._unlist(before)
        self._by_run[_run_of(record)][record.name] = record
        return True

    def drop(self, namespace: str, name: str, *, uid: str, version: int) -> RunKey | None:
        """Drop an object as of a version; returns the run it belonged to."""
        dropped = self._store.drop((namespace, name), uid=uid, version=version)
        return self._unlist(dropped) if dropped is not None else None

    def keep_only(self, uids: Set[str], *, version: int) -> list[RunKey]:
        """Drop what a list of that version does not contain; returns the runs affected."""
        return [self._unlist(record) for _, record in self._store.keep_only(uids, version=version)]

    def get(self, namespace: str, name: str) -> R | None:
        return self._store.get((namespace, name))

    def of_run(self, key: RunKey) -> tuple[R, ...]:
        return tuple(self._by_run[key].values()) if key in self._by_run else ()

    def _unlist(self, record: R) -> RunKey:
        key = _run_of(record)
        records = self._by_run[key]
        del records[record.name]
        if not records:
            del self._by_run[key]
        return key


def _run_of(record: Record) -> RunKey:
    return RunKey(record.namespace, record.run)


class ProgressBook:
    """The newest report of each attempt, by run uid. Not persisted: the next report comes soon."""

    def __init__(self) -> None:
        self._reports: dict[str, dict[tuple[str, int], Progress]] = defaultdict(dict)

    def put(self, run_uid: str, report: Progress) -> bool:
        """Store a report and drop those of older attempts. Returns whether more than numbers changed."""
        reports = self._reports[run_uid]
        known = reports.get((report.stage, report.attempt))
        if known is None:
            for stage, number in [k for k in reports if k[0] == report.stage and k[1] < report.attempt]:
                del reports[stage, number]
        reports[report.stage, report.attempt] = report
        return known is None or _matters(known) != _matters(report)

    def get(self, run_uid: str, stage: str, attempt: int) -> Progress | None:
        return self._reports[run_uid].get((stage, attempt)) if run_uid in self._reports else None

    def of_run(self, run_uid: str) -> tuple[Progress, ...]:
        return tuple(self._reports[run_uid].values()) if run_uid in self._reports else ()

    def forget(self, run_uid: str) -> None:
        self._reports.pop(run_uid, None)

    def clear(self) -> None:
        self._reports.clear()


def _matters(report: Progress) -> tuple[object, ...]:
    """The parts of a report that decisions or conditions depend on."""
    return report.phase, report.endpoint, report.checkpoint


class RefusalBook:
    """Why starts were refused, by run uid. Not persisted: a new leader finds out by trying."""

    def __init__(self) -> None:
        self._refusals: dict[str, dict[str, Refusal]] = {}

    def put(self, run_uid: str, refusal: Refusal) -> bool:
        """Store the newest refusal of a stage. Returns whether it is a new attempt or a new reason."""
        of_run = self._refusals.setdefault(run_uid, {})
        known, of_run[refusal.stage] = of_run.get(refusal.stage), refusal
        return known is None or (known.number, known.outcome.reason) != (refusal.number, refusal.outcome.reason)

    def of_run(self, run_uid: str) -> tuple[Refusal, ...]:
        return tuple(self._refusals.get(run_uid, {}).values())

    def forget(self, run_uid: str) -> None:
        self._refusals.pop(run_uid, None)

    def clear(self) -> None:
        self._refusals.clear()


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Everything known about the runs' children."""

    jobs: Cache[JobRecord] = field(default_factory=Cache)
    deployments: Cache[DeploymentRecord] = field(default_factory=Cache)
    pods: Cache[PodRecord] = field(default_factory=Cache)
    progress: ProgressBook = field(default_factory=ProgressBook)
    refusals: RefusalBook = field(default_factory=RefusalBook)

    def observe(self, key: RunKey, *, run_uid: str, now: datetime) -> Observed:
        """The attempts of a run, without those of an earlier run of the same name."""
        attempts = attempts_of(
            jobs=self.jobs.of_run(key),
            deployments=self.deployments.of_run(key),
            pods=self.pods.of_run(key),
            report=lambda stage, number: self.progress.get(run_uid, stage, number),
            run_uid=run_uid,
            now=now,
        )
        return Observed(now=now, attempts=attempts, refusals=self.refusals.of_run(run_uid))

    def seconds_to_loss(self, key: RunKey, *, now: datetime) -> float | None:
        """Seconds until the next stuck pod counts as lost; nothing else would wake the run for it."""
        waits = [
            (pod.deletion_deadline + LOST_AFTER - now).total_seconds()
            for pod in self.pods.of_run(key)
            if pod.deletion_deadline is not None and not pod.ended
        ]
        return max(1.0, min(waits)) if (waits := [w for w in waits if w > 0]) else None
