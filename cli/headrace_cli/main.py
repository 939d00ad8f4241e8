"""The commands. Each one reads its input, calls one module and prints. ``main`` handles all errors (``problem.py``)."""

import json
import os
import sys
from collections.abc import Collection
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console, RenderableType

from headrace_api.errors import ManifestError, load_run
from headrace_api.run import ConditionType, RunStatus, StageState, TrainingRun
from headrace_cli import chat, forecast, machine, view
from headrace_cli.ask import ask
from headrace_cli.attempts import LocalAttempts
from headrace_cli.forecast import Action
from headrace_cli.home import HOME, RunFolder, run_folder, run_folders
from headrace_cli.live import look
from headrace_cli.local import LocalBody, interrupts, localize
from headrace_cli.logs import read_logs
from headrace_cli.problem import ExitCode, Problem, explain
from headrace_cli.records import Damaged
from headrace_cli.server import find_server
from headrace_cli.stop import stop_run
from headrace_operator.brain.observed import Observed

app = typer.Typer(
    name="headrace", no_args_is_help=True, help="From raw text to a served language model.",
    pretty_exceptions_enable=False,
)  # fmt: skip
_PLAIN_WIDTH = 140
"""Table width when writing to a file or pipe."""


class Output(StrEnum):
    """Output formats."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_PLAIN_WIDTH)


out, err = _console(stderr=False), _console(stderr=True)


def _names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completions for NAME."""
    home = Path(ctx.params.get("home") or os.environ.get("HEADRACE_HOME") or HOME)
    return [folder.name for folder in run_folders(home) if folder.name.startswith(incomplete)]


Manifest = Annotated[Path, typer.Argument(help="A YAML file with one TrainingRun.", metavar="FILE")]
Home = Annotated[Path, typer.Option(envvar="HEADRACE_HOME", help="The folder that holds local runs.")]
Name = Annotated[str, typer.Argument(help="The run's name.", metavar="NAME", autocompletion=_names)]
Format = Annotated[Output, typer.Option("-o", "--output", help="Output format.")]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"headrace {metadata.version('headrace')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """From raw text to a served language model."""


def _load(file: Path) -> TrainingRun:
    """Load a manifest. Any error counts as the manifest's fault."""
    try:
        return load_run(file)
    except ManifestError:
        raise
    except Exception as error:
        raise ManifestError([f"{file}: cannot be read as a manifest: {type(error).__name__}: {error}"]) from error


def _known(home: Path, name: str) -> RunFolder:
    folder = run_folder(home, name)
    if Path(name).name != name or not folder.exists():
        raise Problem(f"{name}: no such run under {home}; start one with `headrace run FILE`, or set --home")
    return folder


def _print(value: Any, table: RenderableType, *, output: Output) -> None:
    match output:
        case Output.JSON:
            print(json.dumps(value, indent=1))
        case Output.YAML:
            print(yaml.safe_dump(value, sort_keys=False), end="")
        case Output.TABLE:
            out.print(table)


@app.command()
def run(file: Manifest, home: Home = HOME) -> None:
    """Run a manifest on this machine. An interrupted run resumes."""
    manifest = _load(file)
    folder = run_folder(home, manifest.metadata.name)
    with interrupts() as asked, folder.locked() as lock:
        local = localize(manifest, manifest=file, folder=folder)
        _warn_of_damage(folder)
        _check_machine(local, stages=[row["stage"] for row in _forecast(local, folder) if row["action"] == Action.RUN])
        folder.save_manifest(local, file=file)
        with view.RunView(err) as watch:
            body = LocalBody(run=local, folder=folder, lock=lock, watch=watch)
            status = body.go(asked)
    _conclude(body.run, status)


def _forecast(local: TrainingRun, folder: RunFolder) -> list[dict[str, Any]]:
    attempts = LocalAttempts(folder=folder.attempts).observe()
    return forecast.forecast(local, Observed(now=datetime.now(UTC), attempts=attempts))


def _check_machine(local: TrainingRun, *, stages: Collection[str]) -> None:
    """Warn about stages that strain this machine.

    Raises:
        ManifestError: the machine cannot run a stage at all.
    """
    findings = machine.check(local, machine.this_machine(), stages=stages)
    errors = [finding.text for finding in findings if finding.severity is machine.Severity.ERROR]
    if errors:
        raise ManifestError(errors)
    for finding in findings:
        err.print(f"warning: {finding.text}", markup=False, soft_wrap=True)


def _warn_of_damage(folder: RunFolder) -> None:
    try:
        folder.status()
    except Damaged as error:
        err.print(f"warning: {error}; looking for results in storage", markup=False, soft_wrap=True)


def _conclude(finished: TrainingRun, status: RunStatus) -> NoReturn:
    """Print how the run ended and exit with its code."""
    kinds = {stage.name: stage.kind for stage in finished.spec.stages}
    out.print(view.summary_view(finished.metadata.name, kinds, status, now=datetime.now(UTC)))
    if status.condition(ConditionType.FAILED):
        failed = next(s for s in status.stages if s.state is StageState.FAILED)
        err.print(f"error: {failed.name}: {failed.reason}: {failed.message}", markup=False, soft_wrap=True)
        err.print(f"For its log: headrace logs {finished.metadata.name} --stage {failed.name}", markup=False)
        raise typer.Exit(ExitCode.FAILED)
    if status.condition(ConditionType.SUSPENDED):
        err.print("Suspended; run the same command again to resume.")
        raise typer.Exit(ExitCode.SUSPENDED)
    _print_results(finished)
    raise typer.Exit(ExitCode.COMPLETE)


def _print_results(finished: TrainingRun) -> None:
    kinds = {stage.name: stage.kind for stage in finished.spec.stages}
    for stage, status in zip(finished.spec.stages, finished.status.stages, strict=True):
        uri = status.artifact.uri if status.artifact is not None else None
        if uri is not None and stage.training is not None:
            out.print(f"History     {uri}/history.png", soft_wrap=True)
        # Only a base model's history is of text, and has a curve beside the unigram baseline.
        if uri is not None and stage.evaluate is not None and kinds[stage.evaluate.from_.model] == "pretrain":
            out.print(f"Loss curve  {uri}/loss_curve.png", soft_wrap=True)
        if uri is not None and stage.constitutional is not None:
            out.print(f"Samples     {uri}/samples.html", soft_wrap=True)
        if uri is not None and stage.kind == "export":
            out.print(f"Model       {uri}", soft_wrap=True)
        if status.endpoint is not None:
            out.print(
                f"Endpoint    {status.endpoint}  (to stop it: headrace stop {finished.metadata.name})", soft_wrap=True
            )


@app.command()
def validate(file: Manifest, home: Home = HOME) -> None:
    """Check a manifest, and warn about what this machine cannot run. Starts nothing."""
    manifest = _load(file)
    stages = ", ".join(f"{s.name} ({s.kind})" for s in manifest.spec.stages)
    out.print(f"{file}: valid: {manifest.metadata.name}: {stages}", markup=False, soft_wrap=True)
    for problem in _problems_here(manifest, file=file, home=home):
        err.print(f"warning: here: {problem}", markup=False, soft_wrap=True)


def _problems_here(manifest: TrainingRun, *, file: Path, home: Path) -> list[str]:
    try:
        local = localize(manifest, manifest=file, folder=run_folder(home, manifest.metadata.name))
    except ManifestError as error:
        return error.problems
    stages = [stage.name for stage in local.spec.stages]
    return [finding.text for finding in machine.check(local, machine.this_machine(), stages=stages)]


@app.command()
def plan(file: Manifest, home: Home = HOME, output: Format = Output.TABLE) -> None:
    """Show what a run would do and need. Starts nothing."""
    manifest = _load(file)
    folder = run_folder(home, manifest.metadata.name)
    _warn_of_damage(folder)
    rows = _forecast(localize(manifest, manifest=file, folder=folder), folder)
    _print(rows, forecast.table(manifest.metadata.name, rows), output=output)


@app.command()
def status(name: Name, home: Home = HOME, output: Format = Output.TABLE) -> None:
    """Show the progress of a local run."""
    seen = look(_known(home, name))
    table = view.summary_view(name, seen.outline.kinds, seen.status, now=datetime.now(UTC))
    _print(seen.status.dump(), table, output=output)
    if output is Output.TABLE:
        for line in view.status_notes(seen):
            out.print(line, markup=False, soft_wrap=True)


@app.command()
def ls(home: Home = HOME, output: Format = Output.TABLE) -> None:
    """List local runs, newest first."""
    rows = [_row(folder) for folder in run_folders(home)]
    if not rows:
        err.print(f"No runs under {home}; start one with `headrace run FILE`, or set --home", soft_wrap=True)
    _print(rows, view.runs_table(rows, now=datetime.now(UTC)), output=output)


def _row(folder: RunFolder) -> dict[str, str]:
    begun = folder.begun_at()
    when = {"begunAt": begun.isoformat(timespec="seconds") if begun is not None else ""}
    try:
        found = look(folder).status
    except Damaged:
        return {"name": folder.name, "state": "Damaged", "stage": "", "progress": "", **when}
    shown = {"state": found.summary or "Pending", "stage": found.stage or "", "progress": found.progress or ""}
    return {"name": folder.name, **shown, **when}


@app.command()
def logs(
    name: Name,
    home: Home = HOME,
    stage: Annotated[str | None, typer.Option(help="Show only this stage.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep printing until the run ends.")] = False,
) -> None:
    """Print the logs of each stage's newest attempt."""
    folder = _known(home, name)
    names = list(folder.outline().kinds)
    if stage is not None and names and stage not in names:
        raise Problem(f"--stage: {stage!r}: no such stage in {name}; choose one of {', '.join(names)}")
    title = None
    for piece in read_logs(folder, stage=stage, follow=follow):
        if piece.title != title:
            title = piece.title
            out.print(f"==> {title} <==", style="bold", markup=False)
        sys.stdout.buffer.write(piece.content)
        sys.stdout.flush()


@app.command()
def stop(name: Name, home: Home = HOME) -> None:
    """Stop a run after a checkpoint, including its server. Works from any terminal."""
    folder = _known(home, name)
    stopped = stop_run(folder)
    said = ", ".join(f"{a.stage} (attempt {a.number})" for a in stopped)
    out.print(f"{name}: stopped {said}" if stopped else f"{name}: nothing was running", soft_wrap=True)


@app.command(name="ask")
def ask_command(
    name: Name, prompt: Annotated[str, typer.Argument(help="The text to continue.")], home: Home = HOME,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 40,
) -> None:  # fmt: skip
    """Have the served model continue a text."""
    folder = _known(home, name)
    answer = ask(find_server(folder, look(folder)), prompt, max_tokens=max_tokens)
    out.print(prompt, style="bold", end="", markup=False, soft_wrap=True)
    out.print(answer, markup=False, soft_wrap=True)


@app.command(name="chat")
def chat_command(
    name: Name,
    prompt: Annotated[str | None, typer.Argument(help="A single question; without it, an interactive chat.")] = None,
    home: Home = HOME,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens per answer.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 decodes greedily; by default the model decides.")
    ] = None,
) -> None:
    """Chat with the served model. Ctrl-C stops an answer, Ctrl-D ends the chat."""
    folder = _known(home, name)
    server = find_server(folder, look(folder))
    chat.check_template(server, name=name)
    told = [] if system is None else [{"role": "system", "content": system}]
    answering = chat.Answering(max_tokens=max_tokens, temperature=temperature)
    conversation = chat.Conversation(server, answering, told)
    ways = {"write": _write_through, "note": lambda text: err.print(f"({text})", style="dim", markup=False)}
    if prompt is None and sys.stdin.isatty():
        chat.converse(conversation, **ways)
    else:
        chat.answer(conversation, sys.stdin.read() if prompt is None else prompt, **ways)


def _write_through(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The file to write.", metavar="FILE")] = Path("run.yaml"),
    text: Annotated[str, typer.Option(help="A file or folder of raw text.")] = "text/",
) -> None:
    """Write a starter manifest."""
    if file.exists():
        raise Problem(f"{file}: already exists; name another file")
    template = (files("headrace_cli") / "templates" / "run.yaml").read_text()
    file.write_text(template.replace("TEXT", json.dumps(text)))
    out.print(f"Wrote {file}. Next: headrace plan {file}; headrace run {file}", markup=False, soft_wrap=True)


def main() -> None:
    """Run a command. Every error becomes readable lines and an exit code."""
    try:
        app()
    except BrokenPipeError:
        # The reader closed the pipe; what is still buffered must not raise at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.FAILED)
    except KeyboardInterrupt:
        sys.exit(ExitCode.SUSPENDED)
    except Exception as error:
        problems, code = explain(error)
        for problem in problems:
            err.print(f"error: {problem}", markup=False, soft_wrap=True)
        sys.exit(code)
