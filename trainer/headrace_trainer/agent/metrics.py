"""The pod's Prometheus metrics, served by the agent so that they outlive its ranks. Off without a port."""

import time

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from headrace_api.contract import Progress, ResolvedStage
from headrace_trainer.agent.settings import Settings

_LABELS = ("namespace", "run", "stage")


class AgentMetrics:
    """Gauges of the latest heartbeat, labelled by namespace, run and stage."""

    def __init__(self, resolved: ResolvedStage, settings: Settings) -> None:
        self.registry = CollectorRegistry()
        self._labels = (resolved.namespace, resolved.run, resolved.stage.name)
        self._gauges = {
            "done": self._gauge("headrace_trainer_done", "Finished units of the stage: steps, documents or tokens."),
            "total": self._gauge("headrace_trainer_planned", "Units that the stage will do in total."),
            "loss": self._gauge("headrace_trainer_loss", "Latest training loss, in nats per token."),
            "tokens_per_second": self._gauge("headrace_trainer_tokens_per_second", "Throughput over all ranks."),
        }
        self._heartbeat = self._gauge("headrace_trainer_last_heartbeat_timestamp_seconds", "When a rank last reported.")
        self._checkpoint = self._gauge(
            "headrace_trainer_last_checkpoint_timestamp_seconds", "When a checkpoint was last committed."
        )
        if settings.metrics_port is not None:
            start_http_server(settings.metrics_port, registry=self.registry)

    def update(self, progress: Progress) -> None:
        """Update the gauges from a heartbeat."""
        for name, gauge in self._gauges.items():
            value = getattr(progress, name)
            if value is not None:
                gauge.labels(*self._labels).set(value)
        self._heartbeat.labels(*self._labels).set(min(progress.time.timestamp(), time.time()))
        if progress.checkpoint is not None:
            self._checkpoint.labels(*self._labels).set(progress.checkpoint.time.timestamp())

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, _LABELS, registry=self.registry)
