"""Prometheus metrics: correct, bounded in number, and gone once a run has ended."""

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from headrace_api.contract import Progress, SavedCheckpoint
from headrace_operator.metrics import MAX_RESULTS, REGISTRY, RunFigures

Json = dict[str, Any]

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def make_run(*stages: Json, name: str = "demo", summary: str = "Running") -> Json:
    return {
        "metadata": {"namespace": "team", "name": name, "uid": f"uid-of-{name}"},
        "spec": {"runtime": "h100"},
        "status": {
            "summary": summary,
            "conditions": [{"type": "Complete", "status": "False"}],
            "stages": list(stages),
        },
    }


CORPUS: Json = {
    "name": "corpus",
    "state": "Succeeded",
    "attempt": 1,
    "startedAt": "2026-01-01T00:00:00Z",
    "finishedAt": "2026-01-01T00:01:30Z",
    "metrics": {"documents": 12},
}
BASE: Json = {"name": "base", "state": "Running", "attempt": 3, "infraRestarts": 2}


def make_report(**changes: Any) -> Progress:
    saved = SavedCheckpoint(step=30, uri="s3://bucket/30", time=NOW)
    told = {"done": 40, "total": 100, "loss": 2.5, "tokens_per_second": 1e6, "eta_seconds": 30, "checkpoint": saved}
    return Progress(**{"stage": "base", "attempt": 3, "time": NOW, **told, **changes})


def exposed(*runs: tuple[Json, tuple[Progress, ...]], figures: RunFigures | None = None) -> list[str]:
    return b"".join((figures or RunFigures()).render(runs)).decode().splitlines()


@pytest.mark.parametrize(
    "line",
    [
        'headrace_run_info{namespace="team",run="demo",runtime="h100",summary="Running"} 1.0',
        'headrace_run_condition{namespace="team",run="demo",type="Complete",status="False"} 1.0',
        'headrace_run_condition{namespace="team",run="demo",type="Complete",status="True"} 0.0',
        'headrace_run_restarts_total{namespace="team",run="demo",stage="base",reason="infra"} 2.0',
        'headrace_stage_state{namespace="team",run="demo",stage="corpus",state="Succeeded"} 1.0',
        'headrace_stage_attempt{namespace="team",run="demo",stage="base"} 3.0',
        'headrace_stage_duration_seconds{namespace="team",run="demo",stage="corpus"} 90.0',
        'headrace_stage_result{namespace="team",run="demo",stage="corpus",name="documents"} 12.0',
        'headrace_stage_done{namespace="team",run="demo",stage="base",unit="steps"} 40.0',
        'headrace_stage_planned{namespace="team",run="demo",stage="base",unit="steps"} 100.0',
        'headrace_stage_loss{namespace="team",run="demo",stage="base"} 2.5',
        'headrace_stage_tokens_per_second{namespace="team",run="demo",stage="base"} 1000000.0',
        'headrace_stage_remaining_seconds{namespace="team",run="demo",stage="base"} 30.0',
        'headrace_stage_checkpoint_step{namespace="team",run="demo",stage="base"} 30.0',
        f'headrace_stage_checkpoint_timestamp_seconds{{namespace="team",run="demo",stage="base"}} {NOW.timestamp()}',
        f'headrace_stage_last_report_timestamp_seconds{{namespace="team",run="demo",stage="base"}} {NOW.timestamp()}',
    ],
)
def test_figures_of_runs(line: str) -> None:
    assert line in exposed((make_run(CORPUS, BASE), (make_report(),)))


@pytest.mark.parametrize(
    ("stage", "attempt"),
    [
        ({**BASE, "state": "Succeeded"}, 3),
        ({**BASE, "state": "Failed"}, 3),
        ({**BASE, "state": "Suspended"}, 3),
        ({**BASE, "attempt": 4}, 3),
        (CORPUS, 3),
    ],
    ids=["succeeded", "failed", "suspended", "a later attempt", "no such stage"],
)
def test_what_has_ended_leaves_no_figures_of_progress(stage: Json, attempt: int) -> None:
    figures = RunFigures()
    exposed((make_run(BASE), (make_report(attempt=attempt),)), figures=figures)
    lines = exposed((make_run(stage), (make_report(attempt=attempt),)), figures=figures)
    told = {name for line in lines if (name := re.split("[{ ]", line)[0]) and not line.startswith("#")}
    progress = ("done", "planned", "loss", "tokens_per_second", "remaining", "checkpoint", "last_report")
    assert told and not [name for name in told if name.removeprefix("headrace_stage_").startswith(progress)]


def test_a_run_that_is_gone_leaves_nothing() -> None:
    figures = RunFigures()
    exposed((make_run(BASE), (make_report(),)), figures=figures)
    assert not [line for line in exposed(figures=figures) if not line.startswith("#")]


def test_figures_follow_their_run() -> None:
    figures = RunFigures()
    before = exposed((make_run(BASE), (make_report(done=1),)), figures=figures)
    after = exposed((make_run({**BASE, "infraRestarts": 3}), (make_report(done=2),)), figures=figures)
    changed = sorted(set(after) - set(before))
    assert [line.split("{")[0] for line in changed] == ["headrace_run_restarts_total", "headrace_stage_done"]
    assert [line.split()[-1] for line in changed] == ["3.0", "2.0"]


def test_a_stage_has_a_bounded_number_of_results_and_only_numbers() -> None:
    results: Json = {f"figure{i:04}": i for i in range(1000)} | {"word": "x", "a" * 200: 1, "nothing": None}
    lines = exposed((make_run({**CORPUS, "metrics": results}), ()))
    found = [line for line in lines if line.startswith("headrace_stage_result{")]
    assert len(found) == MAX_RESULTS
    assert 'name="figure0000"' in found[0]


@pytest.mark.parametrize(
    ("value", "read"), [(float("inf"), "+Inf"), (float("-inf"), "-Inf"), (float("nan"), "NaN"), (3, "3.0")]
)
def test_a_number_that_is_none_is_written_as_prometheus_reads_it(value: float, read: str) -> None:
    (line,) = [line for line in exposed((make_run({**CORPUS, "metrics": {"x": value}}), ())) if 'name="x"' in line]
    assert line.split()[-1] == read


def test_prometheus_reads_whatever_names_a_stage_has() -> None:
    odd = 'say "x"\\ \n{end}'
    lines = exposed((make_run({**CORPUS, "metrics": {odd: 1}}), (make_report(unit=odd[:16]),)))
    families = {f.name: f for f in text_string_to_metric_families("\n".join(lines) + "\n")}
    (sample,) = families["headrace_stage_result"].samples
    assert sample.labels["name"] == odd


@pytest.mark.parametrize("status", [{"stages": None}, {"stages": [{"state": "x"}]}, {"conditions": [{}]}])
def test_a_status_that_is_not_understood_hides_only_itself(status: Json) -> None:
    strange = {**make_run(name="strange"), "status": status}
    lines = exposed((strange, (make_report(),)), (make_run(BASE), ()))
    assert 'headrace_run_info{namespace="team",run="demo",runtime="h100",summary="Running"} 1.0' in lines
    assert "strange" not in "\n".join(lines)


def test_metrics_have_one_prefix_and_base_units() -> None:
    lines = exposed((make_run(CORPUS, BASE), (make_report(),))) + generate_latest(REGISTRY).decode().splitlines()
    types = dict(line.split(" ")[2:4] for line in lines if line.startswith("# TYPE headrace"))
    assert len(types) > 15
    for name, kind in types.items():
        assert name.startswith("headrace_")
        assert not name.endswith(("_ms", "_milliseconds", "_minutes", "_gib", "_mb", "_percent")), name
        assert (kind == "counter") == name.endswith("_total"), name
