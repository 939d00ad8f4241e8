"""One reconcile of one run: observe, plan, write the status, stop, start.

In: a run's key from the queue. Out: when to reconcile it again at the latest. ``plan`` decides; ``apply`` writes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp

from headrace_api.errors import Body, ManifestError, parse_run
from headrace_api.planning.fit import device_errors
from headrace_api.run import Condition, ConditionType, RunStatus, TrainingRun
from headrace_api.runtime import TrainingRuntime
from headrace_api.words import line
from headrace_operator.body.apply import StatusChange, Writer, status_change
from headrace_operator.body.caches import Cluster, RunKey
from headrace_operator.body.kube import ApiError, NotLeading, words
from headrace_operator.body.outcomes import refusal_of
from headrace_operator.body.pace import Pace
from headrace_operator.body.queue import Retry
from headrace_operator.body.raw import Raw
from headrace_operator.body.runs import Runs, runtime_of, uid_of
from headrace_operator.body.store import Store
from headrace_operator.brain.observed import Refusal
from headrace_operator.brain.plan import Event, Plan, plan
from headrace_operator.metrics import RECONCILE_ERRORS, RECONCILE_SECONDS

_REFUSED_SECONDS = 1.0
"""How soon to plan again after a start was refused for a new reason."""


@dataclass(kw_only=True)
class Reconciler:
    """Makes the cluster match what the runs ask for."""

    runs: Runs
    runtimes: Store[str, Raw]
    cluster: Cluster
    writer: Writer
    progress_url: str | None
    """Where pods post their reports."""
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    pace: Pace = field(default_factory=lambda: Pace(now=time.monotonic()))
    _complaints: dict[RunKey, str] = field(default_factory=dict)
    """The last start failure posted as an Event for each run, so that it is posted once."""

    def seconds_to_progress(self, run_uid: str) -> float | None:
        """How long a run's progress has to wait; None if it is already waiting."""
        return None if self.pace.has_turn(run_uid) else self.pace.seconds_to_turn(run_uid, now=time.monotonic())

    async def __call__(self, key: RunKey) -> float | None:
        """Reconcile a run; returns the seconds until it must be reconciled again."""
        with RECONCILE_SECONDS.time():
            try:
                return await self._reconcile(key)
            except Retry:
                RECONCILE_ERRORS.labels(reason="retry").inc()
                raise
            except NotLeading as error:
                raise Retry(str(error)) from error
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                RECONCILE_ERRORS.labels(reason="api").inc()
                raise Retry(words(error)) from error
            except Exception:
                RECONCILE_ERRORS.labels(reason="bug").inc()
                raise

    def forget(self, key: RunKey, run_uid: str) -> None:
        """Forget a deleted run. Another may have its name by now."""
        self.cluster.refusals.forget(run_uid)
        self.writer.forget(run_uid)
        self.pace.forget(run_uid)
        self._complaints.pop(key, None)

    async def _reconcile(self, key: RunKey) -> float | None:
        raw = self.runs.get(key)
        if raw is None:
            return None
        try:
            run = _parse(raw, self._runtime(raw))
        except ManifestError as error:
            await self._refuse(raw, error)
            return None
        now = self.clock()
        decision = plan(run, self.cluster.observe(key, run_uid=run.metadata.uid, now=now))
        runtime = self._runtime(raw) if decision.start else None
        delay = await self._write(raw, self._status(decision, runtime, raw))
        for event in decision.events:
            await self.writer.post_event(raw, event)
        for attempt in decision.stop:
            await self.writer.stop(key, attempt, run_uid=run.metadata.uid)
        again = await self._start(key, raw, decision, runtime) if runtime is not None else None
        return _first(decision.requeue_after_seconds, delay, again, self.cluster.seconds_to_loss(key, now=now))

    async def _start(self, key: RunKey, raw: Raw, decision: Plan, runtime: TrainingRuntime) -> float | None:
        """Start attempts; returns when to plan again if a start was refused."""
        for resolved in decision.start:
            try:
                told = resolved.model_copy(update={"progress_url": self.progress_url})
                await self.writer.start(told, runtime)
            except (ApiError, Retry) as error:
                await self._complain(key, raw, str(error))
                outcome = refusal_of(error)
                if outcome is None:
                    raise
                refusal = Refusal(stage=resolved.stage.name, number=resolved.attempt, outcome=outcome)
                return _REFUSED_SECONDS if self.cluster.refusals.put(resolved.run_uid, refusal) else None
        self._complaints.pop(key, None)
        self.cluster.refusals.forget(raw["metadata"]["uid"])
        return None

    async def _complain(self, key: RunKey, raw: Raw, message: str) -> None:
        if self._complaints.get(key) != message:
            self._complaints[key] = message
            await self.writer.post_event(raw, Event(type="Warning", reason="StartFailed", message=message))

    def _runtime(self, raw: Raw) -> TrainingRuntime | None:
        found = self.runtimes.get(runtime_of(raw))
        return TrainingRuntime.model_validate(found) if found is not None else None

    def _status(self, decision: Plan, runtime: TrainingRuntime | None, raw: Raw) -> dict[str, Any]:
        status = decision.status.dump()
        if decision.start and runtime is None:
            status["summary"] = "Waiting"
            status["phaseMessage"] = f"Waiting: TrainingRuntime {runtime_of(raw)} not found"
        return status

    async def _write(self, raw: Raw, status: dict[str, Any]) -> float | None:
        """Write a status if it is due; otherwise returns the seconds until it is."""
        uid, now = uid_of(raw), time.monotonic()
        change = status_change(raw.get("status", {}), status)
        if change is StatusChange.NONE:
            self.pace.nothing_to_write(uid)
            return None
        if change is StatusChange.PROGRESS and (wait := self.pace.seconds_to_turn(uid, now=now)) > 0:
            return wait
        await self.writer.write_status(raw, status)
        self.pace.written(uid, now=now)
        return None

    async def _refuse(self, raw: Raw, error: ManifestError) -> None:
        """Report an invalid run, and leave alone whatever it has running.

        A complete run was valid once: a stricter operator does not take that back.
        """
        if is_complete(raw):
            return
        status = refused_status(raw, error, now=self.clock())
        if status_change(raw.get("status", {}), status) is not StatusChange.NONE:
            await self._write(raw, status)
            await self.writer.post_event(raw, Event(type="Warning", reason="Invalid", message=str(error)))


def _parse(raw: Raw, runtime: TrainingRuntime | None) -> TrainingRun:
    """Parse and validate a run, including its fit on the runtime's GPUs where their memory is known.

    Raises:
        ManifestError: the API server accepted it, but it cannot be planned.
    """
    known: Raw = {k: raw[k] for k in ("apiVersion", "kind", "metadata", "spec", "status") if k in raw}
    run = parse_run(known, body=Body.CLUSTER)
    errors = device_errors(run, gpu_memory=runtime.spec.trainer.gpu_memory if runtime is not None else None)
    if errors:
        raise ManifestError([line(e.field, e.value, e.remedy) for e in errors])
    return run


def is_complete(raw: Raw) -> bool:
    """Whether a run has completed its current spec."""
    status = raw.get("status", {})
    done = any(c["type"] == ConditionType.COMPLETE and c["status"] == "True" for c in status.get("conditions", []))
    return done and status.get("observedGeneration") == raw["metadata"].get("generation")


def refused_status(raw: Raw, error: ManifestError, *, now: datetime) -> dict[str, Any]:
    """The status of an invalid run: its last status, now failed, with the reason."""
    before = raw.get("status", {})
    known = {c["type"]: c for c in before.get("conditions", [])}
    was = known.get(ConditionType.FAILED, {})
    failed = Condition(
        type=ConditionType.FAILED,
        status="True",
        reason="Invalid",
        message=str(error),
        last_transition_time=was["lastTransitionTime"] if was.get("status") == "True" else now,
    ).dump()
    others = [c for c in known.values() if c["type"] != ConditionType.FAILED]
    fresh = RunStatus(summary="Failed", observed_generation=raw["metadata"].get("generation")).dump()
    return {
        **fresh,
        **before,
        "summary": "Failed",
        "observedGeneration": fresh.get("observedGeneration"),
        "conditions": [*others, failed],
    }


def _first(*seconds: float | None) -> float | None:
    return min((s for s in seconds if s is not None), default=None)
