"""What the operator costs at scale: adoption by a new leader, ``/metrics``, and pods' reports.

    .venv/bin/python benchmarks/operator_scale.py [--runs 10000] [--pods 5000] [--seconds 30] [--out FILE]

A real operator process runs against a stub of the API server (``stub_api``), so every figure is the operator's own:
requests are counted by the stub, CPU seconds are the process' own, whatever else the machine does. Building the text of
``/metrics`` is timed in this process. Prints a table, and writes JSON.

Not called operator.py: Python would take that for its standard module.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from stub_api import StubApi

from headrace_api.contract import REPORT_AFTER_HEADER, Progress, ProgressReport, ResolvedStage
from headrace_api.errors import parse_run
from headrace_api.faults import Outcome
from headrace_api.run import RunStatus, SavedCheckpoint
from headrace_api.runtime import TrainingRuntime
from headrace_operator.body.build import Objects, build, owned
from headrace_operator.brain.observed import Attempt, AttemptState, Observed
from headrace_operator.brain.plan import plan
from headrace_operator.main import allow_many_connections
from headrace_operator.metrics import RunFigures
from headrace_operator.progress import REPORTS_PER_SECOND

Json = dict[str, Any]

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NAMESPACE = "benchmark"
REPORT_SECONDS = 2.0
"""How often a pod reports that is not asked to report less often."""
STAGES: list[Json] = [
    {"name": "corpus", "corpus": {"sources": [{"uri": "s3://raw/text"}]}},
    {"name": "tok", "tokenizer": {"from": {"corpus": "corpus"}, "vocabSize": 4096}},
    {"name": "tokens", "shards": {"from": {"corpus": "corpus", "tokenizer": "tok"}}},
    {
        "name": "base",
        "pretrain": {
            "from": {"shards": "tokens"},
            "model": {"preset": "llama-nano"},
            "tokens": "1M",
            "sequenceLength": 128,
            "globalBatchSize": 16,
            "precision": "fp32",
        },
    },
]
RUNTIME: Json = {
    "apiVersion": "headrace.dev/v1alpha1",
    "kind": "TrainingRuntime",
    "metadata": {"name": "default"},
    "spec": {"trainer": {"image": "trainer:benchmark"}},
}


@dataclass(frozen=True)
class Training:
    """A run whose last stage trains: its manifest with a settled status, and the objects of that stage's attempt."""

    raw: Json
    objects: Objects


def make_training(i: int) -> Training:
    """Plan a run as a leader would, until nothing changes any more."""
    meta = {"name": f"run-{i}", "namespace": NAMESPACE, "uid": f"uid-{i}", "generation": 1}
    kind = {"apiVersion": "headrace.dev/v1alpha1", "kind": "TrainingRun"}
    spec = {"storage": {"uri": f"s3://bucket/run-{i}"}, "stages": STAGES}
    run = parse_run({**kind, "metadata": meta, "spec": spec})
    attempts: dict[str, Attempt] = {}
    before = None
    while run.status != before:
        before = run.status
        decided = plan(run, Observed(now=NOW, attempts=tuple(attempts.values())))
        run = run.model_copy(update={"status": RunStatus.model_validate(decided.status.dump())})
        attempts |= {r.stage.name: make_attempt(r, i) for r in decided.start if r.stage.name not in attempts}
    runtime = TrainingRuntime.model_validate(RUNTIME)
    raw = {**kind, "metadata": meta, "spec": spec, "status": run.status.dump()}
    return Training(raw=raw, objects=build(decided.start[0], runtime))


def make_attempt(resolved: ResolvedStage, i: int) -> Attempt:
    """An attempt that has succeeded, but for the last stage's: that is under way, and its pod runs if ``runs`` says so."""
    stage, number = resolved.stage.name, resolved.attempt
    known = {"stage": stage, "number": number, "hash": resolved.hash, "digest": resolved.digest, "uid": f"job-{i}"}
    if stage != STAGES[-1]["name"]:
        words = Outcome(artifact_digest="ab" * 32, metrics={"documents": 1.0, "tokens": 2.0})
        return Attempt(**known, state=AttemptState.SUCCEEDED, outcome=words)
    if not runs(i):
        return Attempt(**known, state=AttemptState.PENDING, missing="0 of 1 pods run")
    report = Progress(stage=stage, attempt=number, phase="Running", time=NOW)
    return Attempt(**known, state=AttemptState.RUNNING, progress=report)


def runs(i: int) -> bool:
    """Whether a run's pod runs; every other one waits, as for a GPU."""
    return i % 2 == 0


def fill(api: StubApi, trainings: list[Training]) -> None:
    """Everything that the leader before has left."""
    api.add("trainingruntimes", RUNTIME)
    for i, training in enumerate(trainings):
        api.add("trainingruns", training.raw, uid=f"uid-{i}")
        job = api.add("jobs", training.objects.workload, uid=f"job-{i}")
        for plural, obj in (("configmaps", training.objects.config), ("services", training.objects.service)):
            api.add(plural, owned(obj, by=job))
        template = training.objects.workload["spec"]["template"]
        labels = {**template["metadata"]["labels"], "batch.kubernetes.io/job-completion-index": "0"}
        meta = {**template["metadata"], "labels": labels, "name": f"pod-{i}", "namespace": NAMESPACE}
        pod = owned({"metadata": meta, "spec": template["spec"]}, by=job)
        running = {"name": "trainer", "state": {"running": {}}, "restartCount": 0, "ready": True}
        api.add("pods", {**pod, "status": {"phase": "Running", "containerStatuses": [running]} if runs(i) else {}})


class Process:
    """An operator, and what it has used."""

    def __init__(self, api: StubApi, folder: Path) -> None:
        (folder / "kubeconfig").write_text(json.dumps(api.kubeconfig()))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        environment = {
            **os.environ,
            "KUBECONFIG": str(folder / "kubeconfig"),
            "POD_NAMESPACE": NAMESPACE,
            "HEADRACE_HOST": "127.0.0.1",
            "HEADRACE_PORT": str(self.port),
            "HEADRACE_LOG_LEVEL": "warning",
        }
        command = [sys.executable, "-m", "headrace_operator.main"]
        self._log = folder / "operator.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self._usage = psutil.Process(self._process.pid)

    def cpu_seconds(self) -> float:
        """CPU seconds of all its threads, so far."""
        times = self._usage.cpu_times()
        return float(times.user + times.system)

    def memory_bytes(self) -> int:
        """Its resident memory."""
        return int(self._usage.memory_info().rss)

    def get(self, path: str) -> bytes:
        """What it answers; empty while it does not."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
                return bytes(answer.read())
        except OSError:
            return b""

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = self.get("/metrics").decode().splitlines()
        samples = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples)

    def wait(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds."""
        while not holds():
            if self._process.poll() is not None:
                raise RuntimeError(f"the operator has ended: {self._log.read_text()[-2000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(timeout=60)


def measure_adoption(api: StubApi, operator: Process, *, num_runs: int) -> Json:
    """From its start until a new leader has looked at every run: it should find nothing to change."""
    operator.wait(lambda: operator.metric("headrace_operator_reconcile_duration_seconds_count") >= num_runs)
    kinds = ("configmaps", "services", "jobs", "pods", "trainingruns", "serviceaccounts", "events", "deployments")
    asked = {f"{m} {k}": n for (m, k), n in api.requests.items() if k in kinds and m not in ("LIST", "WATCH")}
    return {
        "requests": asked,
        "requests_per_run": sum(asked.values()) / num_runs,
        "cpu_seconds": operator.cpu_seconds(),
        "memory_mib": operator.memory_bytes() / 2**20,
    }


def measure_scrapes(operator: Process, *, times: int = 5) -> Json:
    """``/metrics`` of a process, and how long ``/healthz`` takes meanwhile."""
    waits: list[float] = []
    done = threading.Event()

    def ask_health() -> None:
        while not done.is_set():
            began = time.perf_counter()
            operator.get("/healthz")
            waits.append(time.perf_counter() - began)
            time.sleep(0.01)

    asking = threading.Thread(target=ask_health)
    asking.start()
    used, sizes = operator.cpu_seconds(), [len(operator.get("/metrics")) for _ in range(times)]
    done.set()
    asking.join()
    return {
        "megabytes": sizes[-1] / 1e6,
        "cpu_seconds_per_scrape": (operator.cpu_seconds() - used) / times,
        "health_seconds_median": median(waits),
        "health_seconds_max": max(waits),
    }


def measure_building(trainings: list[Training], *, num_reporting: int) -> Json:
    """CPU seconds of making the lines: all of them, and then those of what has reported."""
    figures, seconds = RunFigures(), []
    for done in range(3):
        told = {i: (make_report(i, done).progress,) for i in range(0, 2 * num_reporting, 2)}
        snapshot = [(training.raw, told.get(i, ())) for i, training in enumerate(trainings)]
        began = time.process_time()
        lines = sum(piece.count(b"\n") for piece in figures.render(snapshot))
        seconds.append(time.process_time() - began)
    return {"lines": lines, "cpu_seconds_first": seconds[0], "cpu_seconds_next": min(seconds[1:])}


def make_report(i: int, done: int) -> ProgressReport:
    """A report of a pod that trains."""
    saved = SavedCheckpoint(step=10, uri=f"s3://bucket/run-{i}/base/checkpoints/10", time=NOW)
    figures = {"done": done, "total": 489, "loss": 2.5, "tokens_per_second": 1e6, "eta_seconds": 300.0}
    now = datetime.now(UTC)
    progress = Progress(stage="base", attempt=1, phase="Running", checkpoint=saved, time=now, **figures)
    return ProgressReport(namespace=NAMESPACE, run=f"run-{i}", progress=progress)


def measure_reports(api: StubApi, operator: Process, *, num_pods: int, seconds: float) -> Json:
    """CPU of the operator while pods report; the first rounds, in which everything is news, are left out."""
    rounds = 3 * max(REPORT_SECONDS, num_pods / REPORTS_PER_SECOND)
    command = [sys.executable, __file__, "--report-to", str(operator.port), "--pods", str(num_pods)]
    reporting = subprocess.Popen([*command, "--seconds", str(seconds + 2 * rounds)])
    taken = "headrace_operator_progress_reports_total"
    operator.wait(lambda: operator.metric(taken) >= num_pods)
    time.sleep(rounds)
    began, used, before, writes = time.monotonic(), operator.cpu_seconds(), operator.metric(taken), dict(api.requests)
    time.sleep(seconds)
    reports, cpu = operator.metric(taken) - before, operator.cpu_seconds() - used
    elapsed = time.monotonic() - began
    reporting.wait(timeout=600)
    asked = {f"{m} {k}": n - writes.get((m, k), 0) for (m, k), n in api.requests.items()}
    return {
        "reports_per_second": reports / elapsed,
        "cpu_seconds_per_report": cpu / reports,
        "cores": cpu / elapsed,
        "status_writes_per_second": asked.get("PATCH trainingruns", 0) / elapsed,
        "token_reviews_per_second": asked.get("POST tokenreviews", 0) / elapsed,
    }


async def report(port: int, *, num_pods: int, seconds: float) -> None:
    """Be the pods: each has its connection, and reports in turn."""
    end = time.monotonic() + seconds

    async def be_pod(i: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for done in range(10**9):
            body = make_report(i, done).model_dump_json(by_alias=True, exclude_none=True).encode()
            head = f"POST /v1/progress HTTP/1.1\r\nHost: operator\r\nContent-Length: {len(body)}\r\n"
            token = f"Authorization: Bearer {NAMESPACE}/pod-{i}\r\nContent-Type: application/json\r\n\r\n"
            writer.write(head.encode() + token.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 204"), answer
            asked = float(answer.partition(f"{REPORT_AFTER_HEADER}: ".encode())[2].partition(b"\r\n")[0])
            if time.monotonic() > end:
                break
            await asyncio.sleep(max(REPORT_SECONDS, asked))
        writer.close()

    pods = []
    for i in range(0, 2 * num_pods, 2):
        pods.append(asyncio.create_task(be_pod(i)))
        await asyncio.sleep(REPORT_SECONDS / num_pods)
    await asyncio.gather(*pods)


def measure(*, num_runs: int, num_pods: int, seconds: float) -> Json:
    """All figures."""
    trainings = [make_training(i) for i in range(num_runs)]
    figures: Json = {"runs": num_runs, "pods": num_pods, "cpus": os.cpu_count(), "python": sys.version.split()[0]}
    figures["building"] = measure_building(trainings, num_reporting=num_pods)
    api = StubApi()
    fill(api, trainings)
    api.start()
    with tempfile.TemporaryDirectory() as folder:
        operator = Process(api, Path(folder))
        try:
            figures["adoption"] = measure_adoption(api, operator, num_runs=num_runs)
            figures["scrapes"] = measure_scrapes(operator)
            figures["reports"] = measure_reports(api, operator, num_pods=num_pods, seconds=seconds)
        finally:
            operator.stop()
    return figures


def main() -> None:
    """Measure, or be the pods that report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000, help="runs, each with an attempt under way")
    parser.add_argument("--pods", type=int, default=5_000, help="pods that report; at most half as many as runs")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long reports are measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "operator_scale.json")
    parser.add_argument("--report-to", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.report_to is not None:
        allow_many_connections()
        asyncio.run(report(chosen.report_to, num_pods=chosen.pods, seconds=chosen.seconds))
        return
    figures = measure(num_runs=chosen.runs, num_pods=min(chosen.pods, chosen.runs // 2), seconds=chosen.seconds)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(figures, indent=2) + "\n")
    for part, measured in figures.items():
        for name, value in measured.items() if isinstance(measured, dict) else [("", measured)]:
            shown = f"{value:.6g}" if isinstance(value, float) else value
            print(f"{part:10} {name:28} {shown}")


if __name__ == "__main__":
    main()
