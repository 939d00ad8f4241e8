"""What people see: a live table on a terminal, plain lines elsewhere, and the tables of ``status`` and ``ls``.

A table that is too wide for the console has a second layout, so that no figure is cut off.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headrace_api.people import people_bytes, people_count, people_time
from headrace_api.run import ConditionType, RunStatus, StageState, StageStatus, TrainingRun
from headrace_api.stages.evaluate import EXACT_MATCH
from headrace_cli.live import INTERRUPTED, Seen
from headrace_operator.brain.active_time import active_seconds
from headrace_operator.brain.plan import Event

_PLAIN_SECONDS = 10.0
_UNBOUNDED = 10_000
_FIGURES = {
    "loss": ("loss", "{:.4f}"),
    "held-out loss": ("validationLoss", "{:.4f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "margin": ("margin", "{:.3f}"),
    "violations before": ("violationsBefore", "{:.1%}"),
    "violations after": ("violationsAfter", "{:.1%}"),
    "exact match": ("exactMatch", "{:.1%}"),
    "kept step": ("keptStep", "{:.0f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "unigram perplexity": ("unigramPerplexity", "{:.2f}"),
}
"""Display name of a metric -> its key and format. A metric that no stage has gets no column."""
_MARKS = {
    StageState.PENDING: ("·", "dim"),
    StageState.WAITING: ("·", "yellow"),
    StageState.STARTING: ("▶", "dim"),
    StageState.RUNNING: ("▶", "cyan"),
    StageState.STOPPING: ("■", "yellow"),
    StageState.SUSPENDED: ("‖", "yellow"),
    StageState.SUCCEEDED: ("✔", "green"),
    StageState.FAILED: ("✘", "red"),
}


class RunView:
    """Follows one run, as a context manager and as the local body's watcher.

    A closed terminal or pipe must not end the run: it only ends the output.
    """

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
            with _tolerant(self._console):
                self._live.stop()

    def __call__(self, run: TrainingRun, events: tuple[Event, ...]) -> None:
        with _tolerant(self._console):
            for event in events:
                style = "red" if event.type == "Warning" else "bold"
                # One print: the live table below would overwrite an unfinished line.
                line = Text.assemble(f"{datetime.now():%H:%M:%S} ", (event.reason, style), f" {event.message}")
                self._console.print(line, soft_wrap=True)
            if self._live is not None:
                self._live.update(live_view(run, now=datetime.now(UTC)))
            else:
                self._plain(run.status)

    def _plain(self, status: RunStatus) -> None:
        """Print a line when the phase changes, and every few seconds while it lasts."""
        line, now = progress_line(status), time.monotonic()
        phase = f"{status.stage} {(status.phase_message or '').partition(':')[0]}"
        if not line or (phase == self._last_line[0] and now - self._last_line[1] < _PLAIN_SECONDS):
            return
        self._last_line = (phase, now)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _tolerant(console: Console) -> Iterator[None]:
    try:
        yield
    except OSError:
        console.quiet = True


class Fitting:
    """The first of several renderings that fits the console, else the last."""

    def __init__(self, *forms: RenderableType) -> None:
        self._forms = forms

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(width=_UNBOUNDED)
        widths = (console.measure(form, options=unbounded).maximum for form in self._forms)
        fitting = (form for form, width in zip(self._forms, widths, strict=True) if width <= options.max_width)
        yield next(fitting, self._forms[-1])


def progress_line(status: RunStatus) -> str:
    """The running stage in one line; empty if nothing runs."""
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


def live_view(run: TrainingRun, *, now: datetime) -> RenderableType:
    """Every stage, and the progress of the running one."""
    kinds = {stage.name: stage.kind for stage in run.spec.stages}
    doing = run.status.phase_message
    table = Fitting(*(_live_table(run.metadata.name, kinds, run.status, now=now, wide=wide) for wide in (True, False)))
    return Group(table, Text(f"{run.status.stage}: {doing}", style="dim")) if doing else table


def _live_table(name: str, kinds: Mapping[str, str], status: RunStatus, *, now: datetime, wide: bool) -> Table:
    table = _plain_table(f"{name}  {status.summary or ''}")
    table.add_column("")
    table.add_column("stage", overflow="fold")
    if wide:
        table.add_column("kind")
    for column in ("done", "", "loss", "tokens/s", "ETA", "time"):
        table.add_column(column, no_wrap=True)
    for stage in status.stages:
        running = stage.name == status.stage and stage.state is not StageState.SUCCEEDED
        kind = (kinds.get(stage.name, ""),) if wide else ()
        cells = _running_cells(status, wide=wide) if running else ("",) * 5
        ended = stage.reason or "" if stage.state is StageState.FAILED else _time(stage, now=now)
        table.add_row(Text(*_MARKS[stage.state]), stage.name, *kind, *cells, ended)
    return table


def _running_cells(status: RunStatus, *, wide: bool) -> tuple[RenderableType, ...]:
    part: RenderableType = status.progress or ""
    if wide and status.progress:
        part = ProgressBar(total=100, completed=int(status.progress.rstrip("%")), width=20)
    return (status.step or "", part, status.loss or "", status.tokens_per_second or "", status.eta or "")


def status_notes(seen: Seen) -> list[str]:
    """Notes to show below a run's table."""
    notes = [line] if (line := progress_line(seen.status)) else []
    under_way = not any(seen.status.condition(kind) for kind in ConditionType)
    if seen.status.summary == INTERRUPTED:
        notes.append(f"No process is running it; to resume: {seen.outline.command}")
    elif under_way and not seen.attended:
        notes.append(
            f"The command that ran it has exited; its agents finish this stage. To take over: {seen.outline.command}"
        )
    return notes


def summary_view(name: str, kinds: Mapping[str, str], status: RunStatus, *, now: datetime) -> RenderableType:
    """A run's stages: time, amounts in and out, loss, and perplexity beside the unigram baseline's."""
    title = f"{name}: {status.summary or 'Pending'}"
    return Fitting(_columns(title, kinds, status, now=now), _list(title, kinds, status, now=now))


def _columns(title: str, kinds: Mapping[str, str], status: RunStatus, *, now: datetime) -> Table:
    """One column per figure."""
    table, figures = Table(title=title, title_justify="left"), _figures(status)
    for column in ("stage", "kind", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("time", "in", "out", *(name.replace(" ", "\n") for name in figures)):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in status.stages:
        table.add_row(
            stage.name,
            kinds.get(stage.name, ""),
            _state(stage, status),
            _time(stage, now=now),
            ", ".join(_amounts(stage.metrics, "In")),
            ", ".join(_amounts(stage.metrics, "Out")),
            *(_figure(stage.metrics, key, form) for key, form in figures.values()),
        )
    return table


def _list(title: str, kinds: Mapping[str, str], status: RunStatus, *, now: datetime) -> Table:
    """All figures of a stage in one column."""
    table = _plain_table(title)
    table.add_column("stage", overflow="fold")
    for column in ("kind", "state", "time"):
        table.add_column(column, no_wrap=True)
    table.add_column("figures", overflow="fold")
    names = _figures(status).items()
    for stage in status.stages:
        figures = [
            *(f"in {amount}" for amount in _amounts(stage.metrics, "In")),
            *(f"out {amount}" for amount in _amounts(stage.metrics, "Out")),
            *(f"{n} {v}" for n, (key, form) in names if (v := _figure(stage.metrics, key, form))),
        ]
        kind, state = kinds.get(stage.name, ""), _state(stage, status)
        table.add_row(stage.name, kind, state, _time(stage, now=now), "\n".join(figures))
    return table


def _figures(status: RunStatus) -> dict[str, tuple[str, str]]:
    """The figures that some stage of the run has: those in ``_FIGURES``, and one per question set."""
    keys = {key: None for stage in status.stages for key in stage.metrics}
    plain = {name: (key, form) for name, (key, form) in _FIGURES.items() if key in keys}
    sets = {f"right: {key.removeprefix(EXACT_MATCH)}": (key, "{:.1%}") for key in keys if key.startswith(EXACT_MATCH)}
    return plain | sets


def runs_table(rows: Iterable[Mapping[str, str]], *, now: datetime) -> Table:
    """The table of ``headrace ls``."""
    table = _plain_table(None)
    columns = ("name", "state", "stage", "progress")
    for column in (*columns, "age"):
        table.add_column(column, overflow="fold", no_wrap=column not in ("name", "stage"))
    for row in rows:
        begun = row["begunAt"]
        age = people_time((now - datetime.fromisoformat(begun)).total_seconds()) if begun else ""
        table.add_row(*(row[column] for column in columns), age)
    return table


def _plain_table(title: str | None) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))


def _state(stage: StageStatus, status: RunStatus) -> Text:
    mark, style = _MARKS[stage.state]
    interrupted = status.summary == INTERRUPTED and stage.name == status.stage
    return Text.assemble((mark, style), f" {INTERRUPTED if interrupted else stage.state.value}")


def _time(stage: StageStatus, *, now: datetime) -> str:
    seconds = active_seconds(stage, now=now)
    return people_time(seconds) if seconds or stage.state is StageState.SUCCEEDED else ""


def _amounts(metrics: Mapping[str, float], way: str) -> list[str]:
    """Format ``documentsIn`` and its like."""
    found = [(key.removesuffix(way), value) for key, value in metrics.items() if key.endswith(way)]
    return [people_bytes(value) if unit == "bytes" else f"{people_count(value)} {unit}" for unit, value in found]


def _figure(metrics: Mapping[str, float], key: str, form: str) -> str:
    return form.format(metrics[key]) if key in metrics else ""
