"""What Prometheus reads of the operator and of every run.

Work is counted where it happens; figures of runs are made from statuses and reports at each scrape, so they cannot
drift from what ``kubectl`` shows and vanish with their run. Names carry base units; labels are namespace, run, stage.
"""

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from headrace_api.contract import Progress

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series and nobody asks for them
REGISTRY = CollectorRegistry()
PlatformCollector(registry=REGISTRY)
ProcessCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

RECONCILE_SECONDS = Histogram(
    "headrace_operator_reconcile_duration_seconds",
    "Time from taking a run out of the queue to having acted on it.",
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
    registry=REGISTRY,
)
RECONCILE_ERRORS = Counter(
    "headrace_operator_reconcile_errors",
    "Reconciliations that ended in an error and come back.",
    ["reason"],
    registry=REGISTRY,
)
QUEUE_DEPTH = Gauge("headrace_operator_queue_depth", "Runs that wait for a worker.", registry=REGISTRY)
WATCH_EVENTS = Counter("headrace_operator_watch_events", "Changes seen.", ["kind"], registry=REGISTRY)
WATCH_FAILURES = Counter("headrace_operator_watch_failures", "Watches that broke.", ["kind"], registry=REGISTRY)
WRITES = Counter("headrace_operator_writes", "Requests that change the cluster.", ["verb", "kind"], registry=REGISTRY)
PROGRESS_REPORTS = Counter(
    "headrace_operator_progress_reports", "Reports of pods, by HTTP status.", ["code"], registry=REGISTRY
)
LEADER = Gauge("headrace_operator_leader", "1 while this replica leads.", registry=REGISTRY)

RUN = ("namespace", "run")
STAGE = ("namespace", "run", "stage")


def register_runs(
    statuses: Callable[[], Iterable[dict[str, Any]]], reports: Callable[[dict[str, Any]], Iterable[Progress]]
) -> None:
    """Serve figures of all runs.

    Args:
        statuses: every TrainingRun, as the API server has it.
        reports: the newest report of each attempt of a run.
    """
    Info("headrace_build", "The operator's version.", registry=REGISTRY).info({"version": version("headrace")})
    REGISTRY.register(RunCollector(statuses, reports))


class RunCollector(Collector):
    """Figures of all runs."""

    def __init__(
        self,
        statuses: Callable[[], Iterable[dict[str, Any]]],
        reports: Callable[[dict[str, Any]], Iterable[Progress]],
    ) -> None:
        self._statuses, self._reports = statuses, reports

    def collect(self) -> Iterator[Metric]:
        """All series, from the present statuses."""
        families = Families()
        for raw in self._statuses():
            families.add_run(raw)
            for report in self._reports(raw):
                families.add_report(raw, report)
        yield from families.all()


class Families:
    """The metrics of runs, filled one run at a time."""

    def __init__(self) -> None:
        gauge = GaugeMetricFamily
        self.info = gauge("headrace_run_info", "A run; always 1.", labels=[*RUN, "runtime", "summary"])
        self.condition = gauge(
            "headrace_run_condition", "1 if a condition has this status.", labels=[*RUN, "type", "status"]
        )
        self.restarts = CounterMetricFamily(
            "headrace_run_restarts", "Restarts, by whose fault.", labels=[*STAGE, "reason"]
        )
        self.state = gauge("headrace_stage_state", "1 for the state that a stage is in.", labels=[*STAGE, "state"])
        self.attempt = gauge("headrace_stage_attempt", "Number of the newest attempt.", labels=STAGE)
        self.duration = gauge(
            "headrace_stage_duration_seconds", "From first start to end, of ended stages.", labels=STAGE
        )
        self.figure = gauge("headrace_stage_result", "A figure that a stage ended with.", labels=[*STAGE, "name"])
        self.done = gauge("headrace_stage_done", "Finished units of the running attempt.", labels=[*STAGE, "unit"])
        self.total = gauge(
            "headrace_stage_planned", "Units that the running attempt has to do.", labels=[*STAGE, "unit"]
        )
        self.loss = gauge("headrace_stage_loss", "Newest training loss, in nats a token.", labels=STAGE)
        self.tokens = gauge("headrace_stage_tokens_per_second", "Newest throughput of all ranks.", labels=STAGE)
        self.eta = gauge("headrace_stage_remaining_seconds", "Time left at the present speed.", labels=STAGE)
        self.checkpoint_step = gauge("headrace_stage_checkpoint_step", "Step of the newest checkpoint.", labels=STAGE)
        self.checkpoint_time = gauge(
            "headrace_stage_checkpoint_timestamp_seconds", "When it was committed.", labels=STAGE
        )
        self.report_time = gauge(
            "headrace_stage_last_report_timestamp_seconds", "When the newest report was made.", labels=STAGE
        )

    def all(self) -> Iterator[Metric]:
        """Every family."""
        yield from (family for family in vars(self).values() if isinstance(family, Metric))

    def add_run(self, raw: dict[str, Any]) -> None:
        """The series of a run's status."""
        run, status = _run_labels(raw), raw.get("status", {})
        runtime = raw.get("spec", {}).get("runtime", "default")
        self.info.add_metric([*run, runtime, status.get("summary", "Pending")], 1)
        for condition in status.get("conditions", []):
            for truth in ("True", "False"):
                self.condition.add_metric([*run, condition["type"], truth], float(condition["status"] == truth))
        for stage in status.get("stages", []):
            self._add_stage([*run, stage["name"]], stage)

    def _add_stage(self, labels: list[str], stage: dict[str, Any]) -> None:
        self.state.add_metric([*labels, stage.get("state", "Pending")], 1)
        self.attempt.add_metric(labels, stage.get("attempt", 0))
        self.restarts.add_metric([*labels, "infra"], stage.get("infraRestarts", 0))
        self.restarts.add_metric([*labels, "user"], stage.get("userRestarts", 0))
        for name, value in stage.get("metrics", {}).items():
            self.figure.add_metric([*labels, name], value)
        if "startedAt" in stage and "finishedAt" in stage:
            span = datetime.fromisoformat(stage["finishedAt"]) - datetime.fromisoformat(stage["startedAt"])
            self.duration.add_metric(labels, span.total_seconds())

    def add_report(self, raw: dict[str, Any], report: Progress) -> None:
        """The series of what an attempt reported last."""
        labels = [*_run_labels(raw), report.stage]
        self.done.add_metric([*labels, report.unit], report.done)
        self.report_time.add_metric(labels, report.time.timestamp())
        for family, value in (
            (self.loss, report.loss),
            (self.tokens, report.tokens_per_second),
            (self.eta, report.eta_seconds),
        ):
            if value is not None:
                family.add_metric(labels, value)
        if report.total is not None:
            self.total.add_metric([*labels, report.unit], report.total)
        if report.checkpoint is not None:
            self.checkpoint_step.add_metric(labels, report.checkpoint.step)
            self.checkpoint_time.add_metric(labels, report.checkpoint.time.timestamp())


def _run_labels(raw: dict[str, Any]) -> list[str]:
    return [raw["metadata"]["namespace"], raw["metadata"]["name"]]
