"""What people see: a live table on a terminal, plain lines elsewhere, and the tables of ``status`` and of the end."""

import time
from datetime import datetime

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headrace_api.run import RunStatus, StageState, StageStatus, TrainingRun
from headrace_operator.brain.plan import Event
from headrace_operator.brain.report import people_count, people_time

_PLAIN_SECONDS = 10.0
_MARKS = {
    StageState.PENDING: "[dim]·[/]",
    StageState.WAITING: "[yellow]·[/]",
    StageState.STARTING: "[dim]▶[/]",
    StageState.RUNNING: "[cyan]▶[/]",
    StageState.STOPPING: "[yellow]■[/]",
    StageState.SUSPENDED: "[yellow]‖[/]",
    StageState.SUCCEEDED: "[green]✔[/]",
    StageState.FAILED: "[red]✘[/]",
}


class RunView:
    """Follows one run. Use as a context manager; it is the local body's watcher."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._last_line = ("", 0.0)

    def __enter__(self) -> "RunView":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, run: TrainingRun, events: tuple[Event, ...]) -> None:
        for event in events:
            style = "red" if event.type == "Warning" else "bold"
            # One print: a live table below would overwrite a line that is not ended.
            line = Text.assemble(f"{datetime.now():%H:%M:%S} ", (event.reason, style), f" {event.message}")
            self._console.print(line, soft_wrap=True)
        if self._live is not None:
            self._live.update(live_table(run))
        else:
            self._plain(run.status)

    def _plain(self, status: RunStatus) -> None:
        """A line when the phase changes, and every few seconds while it lasts."""
        line, now = progress_line(status), time.monotonic()
        phase = f"{status.stage} {(status.phase_message or '').partition(':')[0]}"
        if not line or (phase == self._last_line[0] and now - self._last_line[1] < _PLAIN_SECONDS):
            return
        self._last_line = (phase, now)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def progress_line(status: RunStatus) -> str:
    """The running stage in one line; empty where nothing runs."""
    if status.phase_message is None:
        return ""
    parts = [
        f"{status.stage:<10} {status.phase_message}",
        f"{status.step}" if status.step not in (None, "0") else None,
        status.progress,
        f"loss {status.loss}" if status.loss else None,
        f"{status.tokens_per_second} tokens/s" if status.tokens_per_second else None,
        f"ETA {status.eta}" if status.eta else None,
    ]
    return "  ".join(p for p in parts if p)


def live_table(run: TrainingRun) -> Table:
    """Every stage, and how far the running one is."""
    table = Table(
        title=f"{run.metadata.name}  {run.status.summary or ''}", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for column in ("", "stage", "kind", "done", "", "loss", "tokens/s", "ETA", "now"):
        table.add_column(column)
    for stage, status in zip(run.spec.stages, run.status.stages, strict=False):
        running = status.name == run.status.stage and status.state is not StageState.SUCCEEDED
        cells = _running_cells(run.status) if running else ("", "", "", "", "", _ended(status))
        table.add_row(_MARKS[status.state], status.name, stage.kind, *cells)
    return table


def _running_cells(status: RunStatus) -> tuple[str | ProgressBar, ...]:
    part = int(status.progress.rstrip("%")) if status.progress else None
    bar: str | ProgressBar = ProgressBar(total=100, completed=part, width=20) if part is not None else ""
    shown = (status.loss, status.tokens_per_second, status.eta, status.phase_message)
    return (status.step or "", bar, *(value or "" for value in shown))


def _ended(status: StageStatus) -> str:
    if status.state is StageState.FAILED:
        return f"{status.reason}"
    return people_time(seconds_of(status)) or "" if status.state is StageState.SUCCEEDED else ""


def seconds_of(status: StageStatus) -> float | None:
    """How long a stage took, failed attempts included."""
    if status.started_at is None or status.finished_at is None:
        return None
    return (status.finished_at - status.started_at).total_seconds()


def summary_table(run: TrainingRun) -> Table:
    """The stages of a run: time, what went in and came out, loss and perplexity beside the unigram baseline's."""
    table = Table(title=f"{run.metadata.name}: {run.status.summary}", title_justify="left")
    for column in ("stage", "kind", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("time", "in", "out", "loss", "perplexity", "unigram\nperplexity"):
        table.add_column(column, justify="right")
    for stage, status in zip(run.spec.stages, run.status.stages, strict=False):
        metrics = status.metrics
        table.add_row(
            status.name,
            stage.kind,
            f"{_MARKS[status.state]} {status.state}",
            people_time(seconds_of(status)) or "",
            _amount(metrics, "In"),
            _amount(metrics, "Out"),
            _figure(metrics, "loss", "{:.4f}"),
            _figure(metrics, "perplexity", "{:.2f}"),
            _figure(metrics, "unigramPerplexity", "{:.2f}"),
        )
    return table


def _amount(metrics: dict[str, float], way: str) -> str:
    """``documentsIn`` and its like, as people read them."""
    found = [(key.removesuffix(way), value) for key, value in metrics.items() if key.endswith(way)]
    return ", ".join(f"{people_count(value)} {unit}" for unit, value in found)


def _figure(metrics: dict[str, float], key: str, form: str) -> str:
    return form.format(metrics[key]) if key in metrics else ""
