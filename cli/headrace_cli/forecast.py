"""``headrace plan``: what each stage would do and need, without starting anything.

Skips are not guessed: we ask the planner that ``headrace run`` obeys, again and again, as if every stage that it starts
succeeded at once.
"""

from dataclasses import replace
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.table import Table

from headrace_api.artifact import ARTIFACT_FILE, Artifact
from headrace_api.contract import Progress, ResolvedStage
from headrace_api.faults import FaultClass, Outcome
from headrace_api.model import padded_vocab
from headrace_api.people import people_bytes, people_count
from headrace_api.planning import Estimate, adapter_of, estimate_training
from headrace_api.planning.fit import vocab_size
from headrace_api.references import architecture_of
from headrace_api.run import ConditionType, Stage, StageState, StageStatus, TrainingRun
from headrace_api.stages import RunsAs, Training
from headrace_cli import records
from headrace_cli.local import prepare
from headrace_operator.brain.observed import LIVE, Attempt, AttemptState, Observed
from headrace_operator.brain.plan import AttemptKey, plan

_DEFAULT_VOCAB = 32_768
_PLANS_PER_STAGE = 20
"""A stage needs a few: start, finish, wait for a retry. More means that the planner waits for something impossible."""


class Action(StrEnum):
    """What a run would do with a stage."""

    SKIP = "skip"
    """Its artifact exists and is up to date."""
    RUN = "run"
    KEEP = "keep"
    """It is running, and stays so."""
    WAIT = "wait"
    """The manifest asks for the run to be suspended."""


def forecast(run: TrainingRun, observed: Observed) -> list[dict[str, Any]]:
    """One row per stage: whether it would run, its ranks, and the arithmetic of training.

    A stage rerun from the same spec and inputs is assumed to produce the same artifact.

    Args:
        run: the localized manifest, with the status of an earlier run if there is one.
        observed: that run's attempts.
    """
    actions = _actions(run, observed)
    return [
        {"stage": s.name, "kind": s.kind, "action": actions[s.name].value, **_needs(run, s)} for s in run.spec.stages
    ]


def _actions(run: TrainingRun, observed: Observed) -> dict[str, Action]:
    before = {s.name: s for s in run.status.stages}
    world = {AttemptKey(stage=a.stage, number=a.number): a for a in observed.attempts}
    actions: dict[str, Action] = {}
    run, now = prepare(run, observed), observed.now
    for _ in range(_PLANS_PER_STAGE * len(run.spec.stages)):
        decided = plan(run, Observed(now=now, attempts=tuple(world.values())))
        run = run.model_copy(update={"status": decided.status})
        world |= {key: _stopped(world[key]) for key in decided.stop if key in world and world[key].state in LIVE}
        begun = False
        for resolved in decided.start:
            key = AttemptKey(stage=resolved.stage.name, number=resolved.attempt)
            lives, begun = key in world and world[key].state in LIVE, begun or key not in world
            stored = None if lives else _in_storage(resolved)
            if stored is None:
                actions.setdefault(key.stage, Action.KEEP if lives else Action.RUN)
            digest = stored.digest if stored is not None else _same_or_new(resolved, before.get(key.stage))
            world[key] = _finished(resolved, observed, digest=digest)
        if not begun and any(decided.status.condition(kind) for kind in ConditionType):
            break
        now += timedelta(seconds=decided.requeue_after_seconds or 0)
    done = {s.name for s in run.status.stages if s.state is StageState.SUCCEEDED}
    rest = {s.name: Action.SKIP if s.name in done else Action.WAIT for s in run.spec.stages}
    return rest | actions


def _stopped(attempt: Attempt) -> Attempt:
    outcome = Outcome(fault=FaultClass.STOPPED, reason="Stopped")
    return replace(attempt, state=AttemptState.FAILED, outcome=outcome)


def _finished(resolved: ResolvedStage, observed: Observed, *, digest: str) -> Attempt:
    """The attempt after success: ended or, for a server, answering."""
    serves = resolved.stage.config.RUNS_AS is RunsAs.SERVICE
    progress = Progress(stage=resolved.stage.name, attempt=resolved.attempt, endpoint="http://", time=observed.now)
    return Attempt(
        stage=resolved.stage.name,
        number=resolved.attempt,
        hash=resolved.hash,
        state=AttemptState.RUNNING if serves else AttemptState.SUCCEEDED,
        outcome=None if serves else Outcome(artifact_digest=digest),
        progress=progress if serves else None,
    )


def _in_storage(resolved: ResolvedStage) -> Artifact | None:
    """The stage's artifact, if storage has one that an agent would reuse."""
    if "://" in resolved.output_uri:
        return None
    try:
        artifact = records.read_if_whole(Path(resolved.output_uri) / ARTIFACT_FILE, Artifact)
    except OSError:
        return None
    return artifact if artifact is not None and artifact.hash == resolved.hash else None


def _same_or_new(resolved: ResolvedStage, before: StageStatus | None) -> str:
    """The digest that the stage's artifact will have: the last one, if it is rebuilt from the same spec and inputs."""
    if before is not None and before.hash == resolved.hash and before.artifact is not None:
        return before.artifact.digest
    return resolved.hash


def _needs(run: TrainingRun, stage: Stage) -> dict[str, Any]:
    compute = stage.compute
    needs: dict[str, Any] = {
        "nodes": compute.nodes,
        "ranks": compute.world,
        "gpus": compute.nodes * compute.gpus_per_node,
    }
    training = stage.training
    if training is None:
        return needs
    vocab = vocab_size(run, training) or _DEFAULT_VOCAB
    arch = architecture_of(stage.name, {s.name: s for s in run.spec.stages})
    if arch is None:  # trained elsewhere; only the trainer reads its config.json
        return needs

    def estimate(training: Training) -> Estimate:
        on_gpus = compute.gpus_per_node > 0
        return estimate_training(training, arch, num_ranks=compute.world, vocab_size=vocab, on_gpus=on_gpus)

    found, axes = estimate(training), training.parallelism
    needs |= {
        "layout": f"tensor {axes.tensor} x pipeline {axes.pipeline} x data {found.data_ranks}",
        "vocabSize": vocab,
        "paddedVocabSize": padded_vocab(vocab),
        "parameters": found.parameters,
        "trainedParameters": found.trained_parameters,
        "tokensPerStep": found.tokens_per_step,
        "flopsPerStep": found.flops_per_step,
        "stateBytesPerRank": found.state_bytes_per_rank,
        "activationBytesPerRank": found.activation_bytes_per_rank,
    }
    if found.tokens is not None and found.tokens_per_parameter is not None:
        needs |= {
            "tokens": found.tokens,
            "tokensPerParameter": round(found.tokens_per_parameter, 2),
            "steps": found.steps,
            "flops": found.flops,
        }
    if adapter_of(training) is not None:
        whole = estimate(training.model_copy(update={"adapter": None}))
        needs["withoutAdapter"] = {
            "trainedParameters": whole.trained_parameters,
            "flopsPerStep": whole.flops_per_step,
            "stateBytesPerRank": whole.state_bytes_per_rank,
            "activationBytesPerRank": whole.activation_bytes_per_rank,
        }
    return needs


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    """Render the rows as a table."""
    out = Table(title=f"{name}: what a run would do", title_justify="left", box=None, padding=(0, 2, 0, 0))
    out.add_column("stage", overflow="fold")
    for column in ("kind", "action", "nodes", "ranks"):
        out.add_column(column, no_wrap=True)
    out.add_column("what it needs")
    for row in rows:
        out.add_row(row["stage"], row["kind"], row["action"], str(row["nodes"]), str(row["ranks"]), _prose(row))
    return out


def _prose(row: dict[str, Any]) -> str:
    if "parameters" not in row:
        return ""
    parts = [_work(row), _memory(row) + " per rank"]
    if "withoutAdapter" in row:
        whole = row["withoutAdapter"]
        parts.append(
            f"without the adapter {people_count(whole['trainedParameters'])} parameters trained, "
            f"{whole['flopsPerStep']:.2e} FLOPs per step, {_memory(whole)} per rank"
        )
    return f"{row['layout']}; " + "; ".join(parts)


def _work(row: dict[str, Any]) -> str:
    """What is trained, and for how long."""
    parameters = f"{people_count(row['parameters'])} parameters"
    if row["trainedParameters"] < row["parameters"]:
        parameters += f", of which {people_count(row['trainedParameters'])} are trained"
    if "steps" not in row:
        return (
            f"{parameters}, as many steps of {people_count(row['tokensPerStep'])} tokens as the records fill, "
            f"{row['flopsPerStep']:.2e} FLOPs each"
        )
    return (
        f"{parameters}, {people_count(row['tokens'])} tokens "
        f"({row['tokensPerParameter']:.1f} per parameter; about 20 is compute-optimal), {row['steps']:,} steps of "
        f"{people_count(row['tokensPerStep'])} tokens, {row['flops']:.2e} FLOPs"
    )


def _memory(row: dict[str, Any]) -> str:
    state, activations = people_bytes(row["stateBytesPerRank"]), people_bytes(row["activationBytesPerRank"])
    return f"{state} of state and about {activations} of activations"
