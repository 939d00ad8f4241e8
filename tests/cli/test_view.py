"""Output on an 80-column terminal: every figure in full."""

import io
import re
from datetime import timedelta

import pytest
from rich.console import Console

from builders import START, make_run
from headrace_api.people import people_count
from headrace_api.run import RunStatus, StageState, StageStatus
from headrace_cli import view
from headrace_cli.forecast import forecast, table
from headrace_cli.live import INTERRUPTED
from headrace_operator.brain.observed import Observed

METRICS = {
    "corpus": {"documentsIn": 59_200, "documentsOut": 12_345_678, "charactersOut": 24.1e9},
    "tok": {"vocabSize": 65_536},
    "tokens": {"documentsIn": 12_345_678, "tokensOut": 140e9},
    "base": {"tokensIn": 140e9, "loss": 4.5492},
    "eval": {"tokensIn": 124_900, "loss": 14.1615, "perplexity": 12_345.67, "unigramPerplexity": 123_845.92},
    "ship": {"bytesOut": 13.5e9},
    "serve": {},
}
FIGURES = [
    "59.2k documents", "12.3M documents", "24.1B characters", "140B tokens", "124.9k tokens", "4.5492", "14.1615",
    "12345.67", "123845.92", "13.5 GB", "13d21h",
]  # fmt: skip


def rendered(what, *, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
    console.print(what)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


def status(*, state: StageState = StageState.SUCCEEDED, current: str = "serve", **fields) -> RunStatus:
    stages = [
        StageStatus(name=name, state=StageState.SUCCEEDED, metrics=metrics, active_seconds=1_200_000)
        for name, metrics in METRICS.items()
    ]
    stages = [s.model_copy(update={"state": state}) if s.name == current else s for s in stages]
    return RunStatus(stages=stages, stage=current, **fields)


@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_the_summary_loses_no_figure(width):
    run = make_run()
    kinds = {s.name: s.kind for s in run.spec.stages}
    text = rendered(view.summary_view("demo", kinds, status(summary="Complete"), now=START), width=width)
    for figure in [*FIGURES, *METRICS, *kinds.values(), "Complete"]:
        assert figure in text, f"{figure} is cut:\n{text}"


@pytest.mark.parametrize("width", [80, 140])
def test_the_live_table_loses_no_figure(width):
    run = make_run().model_copy(
        update={
            "status": status(
                state=StageState.RUNNING,
                current="base",
                summary="Running",
                step="1234567/12000000",
                progress="10%",
                loss="12.3456",
                tokens_per_second="123.4k",
                eta="115d17h",
                phase_message="Running: " + "checkpoint of step 1234000 is being written; " * 3,
            )
        }
    )
    text = rendered(view.live_view(run, now=START), width=width)
    for figure in ("1234567/12000000", "12.3456", "123.4k", "115d17h", "13d21h", *METRICS):
        assert figure in text, f"{figure} is cut:\n{text}"
    assert "…" not in text
    assert width > 80 or "10%" in text


AFTER_TRAINING = {
    "sft": {"recordsIn": 9_000, "tokensIn": 900e3, "loss": 0.4321, "validationLoss": 0.5432},
    "judge": {"recordsIn": 1_350, "loss": 0.1234, "validationLoss": 0.2345, "accuracy": 0.987, "margin": 3.456},
    "aligned": {"recordsIn": 1_350, "loss": 0.3456, "validationLoss": 0.4567, "accuracy": 1.0, "margin": 5.678},
    "eval": {"tokensIn": 50e3, "perplexity": 81.25, "exactMatch/short": 0.015, "exactMatch/sentence": 0.965},
}


@pytest.mark.parametrize("width", [80, 140, 200])
def test_what_matters_of_the_stages_after_pretraining_is_shown(width):
    stages = [StageStatus(name=n, state=StageState.SUCCEEDED, metrics=m) for n, m in AFTER_TRAINING.items()]
    kinds = {"sft": "sft", "judge": "reward", "aligned": "dpo", "eval": "evaluate"}
    shown = view.summary_view("demo", kinds, RunStatus(stages=stages, summary="Complete"), now=START)
    text = rendered(shown, width=width)
    figures = ("9k records", "900k tokens", "0.4321", "0.5432", "98.7%", "3.456", "100.0%", "5.678", "1.5%", "96.5%")
    for figure in (*figures, "81.25", "short", "sentence", "right:"):
        assert figure in text, f"{figure} is cut:\n{text}"


def test_a_figure_that_no_stage_has_has_no_column():
    stages = [StageStatus(name="base", state=StageState.SUCCEEDED, metrics={"loss": 4.5})]
    shown = view.summary_view("demo", {"base": "pretrain"}, RunStatus(stages=stages, summary="Complete"), now=START)
    text = rendered(shown, width=200)
    assert "loss" in text
    for absent in ("accuracy", "margin", "perplexity", "right:"):
        assert absent not in text


def test_names_of_forty_letters_are_wrapped_and_figures_are_not():
    name = "a" * 39 + "b"
    stage = StageStatus(name=name, state=StageState.SUCCEEDED, metrics=METRICS["eval"], active_seconds=1_200_000)
    text = rendered(
        view.summary_view("demo", {name: "evaluate"}, RunStatus(stages=[stage], summary="Complete"), now=START),
        width=80,
    )
    for figure in ("124.9k tokens", "14.1615", "12345.67", "123845.92", "13d21h"):
        assert figure in text
    assert re.sub(r"[^ab]", "", "".join(line[:30] for line in text.splitlines())).count("a") >= 39


def test_the_plan_loses_no_figure():
    run = make_run()
    rows = forecast(run, Observed(now=START))
    text = " ".join(rendered(table("demo", rows), width=80).split())
    base = next(r for r in rows if r["stage"] == "base")
    for key in ("parameters", "tokens", "tokensPerStep"):
        assert people_count(base[key]) in text
    assert f"{base['steps']:,} steps" in text or f"{base['steps']:,}" in text
    assert f"{base['flops']:.2e}" in text


def test_the_list_of_runs_loses_no_figure():
    begun = START.isoformat()
    row = {"name": "n" * 40, "state": INTERRUPTED, "stage": "s" * 40, "progress": "100%", "begunAt": begun}
    text = rendered(view.runs_table([row], now=START + timedelta(days=115, hours=17)), width=80)
    for figure in (INTERRUPTED, "100%", "115d17h"):
        assert figure in text
    assert text.count("n") - text.count("name") >= 40


def test_a_time_that_runs_is_shown_while_it_runs():
    stage = StageStatus(name="base", state=StageState.RUNNING, active_seconds=60, active_since=START)
    text = rendered(
        view.summary_view("demo", {}, RunStatus(stages=[stage], stage="base"), now=START + timedelta(minutes=2)),
        width=80,
    )
    assert "3m" in text
