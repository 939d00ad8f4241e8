"""Prometheus metrics of the operator and of every run.

Work is counted where it happens. Metrics of runs are rendered from statuses and reports, so they cannot drift from what
``kubectl`` shows, and they vanish with their run; progress metrics vanish with the attempt. A run's lines are rendered
again only when it changes, and in a thread: ten thousand runs make a few hundred thousand lines.

Names carry base units. Labels are namespace, run and stage, plus a few with a bounded number of values per stage.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from math import isfinite
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from headrace_api.contract import Progress

logger = logging.getLogger(__name__)

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the number of series
REGISTRY = CollectorRegistry()
PlatformCollector(registry=REGISTRY)
ProcessCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

RECONCILE_SECONDS = Histogram(
    "headrace_operator_reconcile_duration_seconds",
    "Duration of one reconcile of a run.",
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
    registry=REGISTRY,
)
RECONCILE_ERRORS = Counter(
    "headrace_operator_reconcile_errors",
    "Reconciles that failed and will be retried.",
    ["reason"],
    registry=REGISTRY,
)
QUEUE_DEPTH = Gauge("headrace_operator_queue_depth", "Runs waiting for a worker.", registry=REGISTRY)
WATCH_EVENTS = Counter("headrace_operator_watch_events", "Watch events received.", ["kind"], registry=REGISTRY)
WATCH_FAILURES = Counter("headrace_operator_watch_failures", "Watches that failed.", ["kind"], registry=REGISTRY)
WRITES = Counter("headrace_operator_writes", "Requests that change the cluster.", ["verb", "kind"], registry=REGISTRY)
PROGRESS_REPORTS = Counter(
    "headrace_operator_progress_reports", "Progress reports from pods, by HTTP status.", ["code"], registry=REGISTRY
)
LEADER = Gauge("headrace_operator_leader", "1 while this replica leads.", registry=REGISTRY)

Info("headrace_build", "The operator's version.", registry=REGISTRY).info({"version": version("headrace")})


@dataclass(frozen=True, eq=False)
class Family:
    """A metric family of runs."""

    name: str
    help: str
    kind: str = "gauge"

    @property
    def header(self) -> bytes:
        """Its HELP and TYPE lines."""
        return f"# HELP {self.name} {self.help}\n# TYPE {self.name} {self.kind}\n".encode()


INFO = Family("headrace_run_info", "A run; always 1.")
CONDITION = Family("headrace_run_condition", "1 if a condition has this status.")
RESTARTS = Family("headrace_run_restarts_total", "Restarts, by budget (infra or user).", "counter")
STATE = Family("headrace_stage_state", "1 for the stage's current state.")
ATTEMPT = Family("headrace_stage_attempt", "Number of the newest attempt.")
DURATION = Family("headrace_stage_duration_seconds", "Time from first start to end, for stages that have ended.")
RESULT = Family("headrace_stage_result", "A result metric of a finished stage.")
DONE = Family("headrace_stage_done", "Units finished by the running attempt.")
PLANNED = Family("headrace_stage_planned", "Units that the running attempt will do in total.")
LOSS = Family("headrace_stage_loss", "Latest training loss, in nats per token.")
TOKENS = Family("headrace_stage_tokens_per_second", "Latest throughput over all ranks.")
REMAINING = Family("headrace_stage_remaining_seconds", "Estimated time left at the current speed.")
CHECKPOINT_STEP = Family("headrace_stage_checkpoint_step", "Step of the latest checkpoint.")
CHECKPOINT_TIME = Family("headrace_stage_checkpoint_timestamp_seconds", "When the latest checkpoint was committed.")
REPORT_TIME = Family("headrace_stage_last_report_timestamp_seconds", "When the latest report was made.")
FAMILIES = (
    *(INFO, CONDITION, RESTARTS, STATE, ATTEMPT, DURATION, RESULT),
    *(DONE, PLANNED, LOSS, TOKENS, REMAINING, CHECKPOINT_STEP, CHECKPOINT_TIME, REPORT_TIME),
)

MAX_RESULTS = 32
"""Result metrics exported per stage. A stage with more has put data into metric names."""
_MAX_NAME = 64
_ENDED = frozenset({"Succeeded", "Failed", "Suspended"})
_UNFIT = (AttributeError, KeyError, TypeError, ValueError)

Lines = dict[Family, bytes]
RunAndReports = tuple[dict[str, Any], tuple[Progress, ...]]
"""A TrainingRun as the API server sent it, and its newest reports."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The lines rendered from one status or report, and their source."""

    source: Any
    lines: Lines
    live: frozenset[tuple[str, int]] = frozenset()
    """(stage, attempt) pairs that have not ended; only their reports are exported."""


@dataclass
class RunFigures:
    """Renders the lines of all runs. Not thread-safe."""

    _statuses: dict[str, _Part] = field(default_factory=dict)
    """run uid -> the lines of its status."""
    _reports: dict[tuple[str, str], _Part] = field(default_factory=dict)
    """(run uid, stage) -> the lines of its newest report."""

    def render(self, runs: Sequence[RunAndReports]) -> Iterator[bytes]:
        """The lines, one chunk per metric."""
        parts = list(self._parts(runs))
        for family in FAMILIES:
            yield b"".join([family.header, *(lines[family] for lines in parts if family in lines)])

    def _parts(self, runs: Sequence[RunAndReports]) -> Iterator[Lines]:
        statuses, reports = self._statuses, self._reports
        self._statuses, self._reports = {}, {}
        for raw, told in runs:
            uid = raw["metadata"]["uid"]
            part = statuses.get(uid)
            if part is None or part.source is not raw:
                part = status_part(raw)
            self._statuses[uid] = part
            yield part.lines
            for report in told:
                if (report.stage, report.attempt) not in part.live:
                    continue
                made = reports.get((uid, report.stage))
                if made is None or made.source is not report:
                    made = _Part(report, report_lines(raw, report))
                self._reports[uid, report.stage] = made
                yield made.lines


def status_part(raw: dict[str, Any]) -> _Part:
    """Render a run's status; nothing if another operator version wrote it in an unknown format."""
    lines, run = _Writer(), _run_labels(raw)
    try:
        _write_run(lines, run, raw)
        stages = raw.get("status", {}).get("stages", [])
        live = frozenset((s["name"], s.get("attempt", 0)) for s in stages if s.get("state") not in _ENDED)
    except _UNFIT as error:
        logger.debug("figures of %s: %r", run, error)
        return _Part(raw, {})
    return _Part(raw, lines.joined(), live)


def report_lines(raw: dict[str, Any], report: Progress) -> Lines:
    """Render an attempt's newest report."""
    lines, stage = _Writer(), f'{_run_labels(raw)},stage="{escape(report.stage)}"'
    counted = f'{stage},unit="{escape(report.unit)}"'
    lines.add(DONE, counted, report.done)
    lines.add(REPORT_TIME, stage, report.time.timestamp())
    for family, labels, value in (
        (PLANNED, counted, report.total),
        (LOSS, stage, report.loss),
        (TOKENS, stage, report.tokens_per_second),
        (REMAINING, stage, report.eta_seconds),
    ):
        if value is not None:
            lines.add(family, labels, value)
    if report.checkpoint is not None:
        lines.add(CHECKPOINT_STEP, stage, report.checkpoint.step)
        lines.add(CHECKPOINT_TIME, stage, report.checkpoint.time.timestamp())
    return lines.joined()


def _write_run(lines: "_Writer", run: str, raw: dict[str, Any]) -> None:
    status = raw.get("status", {})
    runtime, summary = raw.get("spec", {}).get("runtime", "default"), status.get("summary", "Pending")
    lines.add(INFO, f'{run},runtime="{escape(runtime)}",summary="{escape(summary)}"', 1)
    for condition in status.get("conditions", []):
        for truth in ("True", "False"):
            labels = f'{run},type="{escape(condition["type"])}",status="{truth}"'
            lines.add(CONDITION, labels, int(condition["status"] == truth))
    for stage in status.get("stages", []):
        _write_stage(lines, f'{run},stage="{escape(stage["name"])}"', stage)


def _write_stage(lines: "_Writer", labels: str, stage: dict[str, Any]) -> None:
    lines.add(STATE, f'{labels},state="{escape(stage.get("state", "Pending"))}"', 1)
    lines.add(ATTEMPT, labels, stage.get("attempt", 0))
    lines.add(RESTARTS, f'{labels},reason="infra"', stage.get("infraRestarts", 0))
    lines.add(RESTARTS, f'{labels},reason="user"', stage.get("userRestarts", 0))
    for name, value in _bounded(stage.get("metrics", {})):
        lines.add(RESULT, f'{labels},name="{escape(name)}"', value)
    if "startedAt" in stage and "finishedAt" in stage:
        span = datetime.fromisoformat(stage["finishedAt"]) - datetime.fromisoformat(stage["startedAt"])
        lines.add(DURATION, labels, span.total_seconds())


def _bounded(results: dict[str, Any]) -> Iterable[tuple[str, float]]:
    """A stage's numeric results, up to ``MAX_RESULTS``."""
    fit = [(k, v) for k, v in sorted(results.items()) if isinstance(v, int | float) and len(k) <= _MAX_NAME]
    return fit[:MAX_RESULTS]


class _Writer:
    """Collects the lines of one run by metric."""

    def __init__(self) -> None:
        self._lines: dict[Family, str] = {}

    def add(self, family: Family, labels: str, value: float) -> None:
        line = f"{family.name}{{{labels}}} {number(value)}\n"
        before = self._lines.get(family)
        self._lines[family] = line if before is None else before + line

    def joined(self) -> Lines:
        return {family: lines.encode() for family, lines in self._lines.items()}


def number(value: float) -> str:
    """A number in Prometheus' text format."""
    if isfinite(value):
        return repr(float(value))
    return "NaN" if value != value else "+Inf" if value > 0 else "-Inf"


def escape(value: Any) -> str:
    """Escape a label value."""
    return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _run_labels(raw: dict[str, Any]) -> str:
    meta = raw["metadata"]
    return f'namespace="{escape(meta["namespace"])}",run="{escape(meta["name"])}"'
