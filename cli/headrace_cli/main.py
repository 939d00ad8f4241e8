"""The commands. Each is thin: read, call one module, print, and exit with 0 (complete), 1 (failed) or 2 (invalid)."""

import json
import shutil
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from headrace_api.errors import ManifestError, load_run
from headrace_api.run import ConditionType, RunStatus, StageState, TrainingRun
from headrace_cli import forecast, view
from headrace_cli.ask import AskError, ask
from headrace_cli.home import Busy, RunFolder, run_folder
from headrace_cli.local import LocalBody, interrupt_suspends, localize, stop_all

EXIT_FAILED, EXIT_INVALID, EXIT_SUSPENDED = 1, 2, 130

app = typer.Typer(
    name="headrace", no_args_is_help=True, add_completion=False, help="From raw text to a served language model.",
    pretty_exceptions_enable=False,
)  # fmt: skip
_PLAIN_WIDTH = 140
"""Columns of a table that goes to a file or a pipe."""


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_PLAIN_WIDTH)


out, err = _console(stderr=False), _console(stderr=True)

Manifest = Annotated[Path, typer.Argument(help="A YAML file with one TrainingRun.", metavar="FILE")]
Home = Annotated[Path, typer.Option(envvar="HEADRACE_HOME", help="Where local runs keep their state.")]
Name = Annotated[str, typer.Argument(help="The run's name.", metavar="NAME")]
Output = Annotated[str, typer.Option("-o", "--output", help="table or json.")]

_HOME = Path(".headrace")


def _invalid(error: Exception) -> NoReturn:
    problems = error.problems if isinstance(error, ManifestError) else [str(error)]
    for problem in problems:
        err.print(f"error: {problem}", markup=False, soft_wrap=True)
    raise typer.Exit(EXIT_INVALID)


def _load(file: Path) -> TrainingRun:
    try:
        return load_run(file)
    except ManifestError as error:
        _invalid(error)


def _known(home: Path, name: str) -> RunFolder:
    folder = run_folder(home, name)
    if not folder.exists():
        _invalid(
            ValueError(f"{name}: no run of this name under {home}; start one with `headrace run FILE`, or set --home")
        )
    return folder


@app.command()
def run(file: Manifest, home: Home = _HOME) -> None:
    """Run a manifest on this machine; a run that was interrupted goes on where it was."""
    manifest = _load(file)
    folder = run_folder(home, manifest.metadata.name)
    try:
        with folder.locked():
            folder.save_manifest(manifest)
            local = localize(manifest, manifest=file, folder=folder)
            with view.RunView(err) as watch, interrupt_suspends() as suspend:
                body = LocalBody(run=local, folder=folder, watch=watch)
                status = body.go(suspend=suspend)
    except Busy as error:
        _invalid(error)
    _conclude(body.run, status)


def _conclude(finished: TrainingRun, status: RunStatus) -> NoReturn:
    """Print how the run ended and leave with its exit code."""
    out.print(view.summary_table(finished))
    if status.condition(ConditionType.FAILED):
        failed = next(s for s in status.stages if s.state is StageState.FAILED)
        err.print(f"error: {failed.name}: {failed.reason}: {failed.message}", markup=False, soft_wrap=True)
        err.print(f"The log: headrace logs {finished.metadata.name} --stage {failed.name}", markup=False)
        raise typer.Exit(EXIT_FAILED)
    if status.condition(ConditionType.SUSPENDED):
        err.print("Suspended; run the same command again to go on.")
        raise typer.Exit(EXIT_SUSPENDED)
    _print_results(finished)
    raise typer.Exit(0)


def _print_results(finished: TrainingRun) -> None:
    for stage, status in zip(finished.spec.stages, finished.status.stages, strict=True):
        if stage.kind == "evaluate" and status.artifact is not None:
            out.print(f"Loss curve  {status.artifact.uri}/loss_curve.png", soft_wrap=True)
        if stage.kind == "export" and status.artifact is not None:
            out.print(f"Model       {status.artifact.uri}", soft_wrap=True)
        if status.endpoint is not None:
            out.print(
                f"Endpoint    {status.endpoint}  (ends with: headrace stop {finished.metadata.name})", soft_wrap=True
            )


@app.command()
def validate(file: Manifest) -> None:
    """Check a manifest; nothing is started."""
    manifest = _load(file)
    stages = ", ".join(f"{s.name} ({s.kind})" for s in manifest.spec.stages)
    out.print(f"{file}: valid: {manifest.metadata.name}: {stages}", markup=False, soft_wrap=True)


@app.command()
def plan(file: Manifest, home: Home = _HOME, output: Output = "table") -> None:
    """Show what a run would do and need; nothing is started."""
    manifest = _load(file)
    folder = run_folder(home, manifest.metadata.name)
    rows = forecast.forecast(localize(manifest, manifest=file, folder=folder) if folder.exists() else manifest)
    if output == "json":
        print(json.dumps(rows, indent=1))
    else:
        out.print(forecast.table(manifest.metadata.name, rows))


@app.command()
def status(name: Name, home: Home = _HOME, output: Output = "table") -> None:
    """Show how far a local run is."""
    stored = _known(home, name).load()
    if output == "json":
        print(json.dumps(stored.status.dump(), indent=1))
        return
    out.print(view.summary_table(stored))
    if line := view.progress_line(stored.status):
        out.print(line, markup=False)


@app.command()
def logs(
    name: Name,
    home: Home = _HOME,
    stage: Annotated[str | None, typer.Option(help="Only this stage.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on while more is written.")] = False,
) -> None:
    """Print what the newest attempt of each stage wrote."""
    folder = _known(home, name)
    stored = folder.load()
    names = [s.name for s in stored.spec.stages]
    if stage is not None and stage not in names:
        _invalid(ValueError(f"--stage: {stage!r}: no such stage in {name}; choose one of {', '.join(names)}"))
    newest = {s.name: s.attempt for s in stored.status.stages}
    paths = [
        p
        for s in names
        if stage in (None, s)
        for p in sorted((folder.attempts / f"{s}-{newest.get(s, 0)}").glob("agent-*.log"))
    ]
    for path in paths:
        out.print(f"==> {path.parent.name} {path.stem} <==", style="bold", markup=False)
        with path.open("r", errors="replace") as log:
            shutil.copyfileobj(log, sys.stdout)
            while follow and path == paths[-1]:
                shutil.copyfileobj(log, sys.stdout)
                sys.stdout.flush()
                time.sleep(0.5)


@app.command()
def stop(name: Name, home: Home = _HOME) -> None:
    """Stop what a local run left running, its server included."""
    folder = _known(home, name)
    try:
        with folder.locked():
            stopped = stop_all(folder, timeout=150)
    except (Busy, TimeoutError) as error:
        _invalid(error)
    out.print(f"{name}: stopped {stopped} of its attempts" if stopped else f"{name}: nothing was running")


@app.command(name="ask")
def ask_command(
    name: Name, prompt: Annotated[str, typer.Argument(help="The text to continue.")], home: Home = _HOME,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 40,
) -> None:  # fmt: skip
    """Have the served model continue a text."""
    endpoint = _known(home, name).load().status.endpoint
    if endpoint is None:
        _invalid(ValueError(f"{name}: serves no model; add a deploy stage, or run it again"))
    try:
        answer = ask(endpoint, prompt, max_tokens=max_tokens)
    except AskError as error:
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(EXIT_FAILED) from error
    out.print(prompt, style="bold", end="", markup=False, soft_wrap=True)
    out.print(answer, markup=False, soft_wrap=True)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The file to write.", metavar="FILE")] = Path("run.yaml"),
    text: Annotated[str, typer.Option(help="A file or folder with raw text.")] = "text/",
) -> None:
    """Write a manifest to start from."""
    if file.exists():
        _invalid(ValueError(f"{file}: exists; name another file"))
    template = (files("headrace_cli") / "templates" / "run.yaml").read_text()
    file.write_text(template.replace("TEXT", json.dumps(text)))
    out.print(f"Wrote {file}. Next: headrace plan {file}; headrace run {file}", markup=False, soft_wrap=True)


def main() -> None:
    """The entry point of the ``headrace`` command."""
    app()
