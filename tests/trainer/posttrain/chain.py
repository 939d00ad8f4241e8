"""A base model as an artifact, and stages that train it further, rank by rank."""

import json
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_api.artifact import ArtifactRef
from headrace_api.contract import ResolvedStage
from headrace_api.run import Storage
from trainer.data.builders import corpus_config, finish, make_context, prose, write_jsonl
from trainer.engine.gangs import Ended, gang

MODEL = {"layers": 2, "hiddenSize": 64, "heads": 4, "kvHeads": 2, "ffnHiddenSize": 128}


@dataclass(frozen=True)
class Base:
    """A model that was pretrained a little, in a storage."""

    storage: Storage
    model: ArtifactRef
    shards: ArtifactRef


def pretrained(folder: Path, *, steps: int = 30) -> Base:
    """Train a base model on prose, with a tokenizer that knows no template."""
    storage = Storage(uri=str(folder / "storage"))
    texts = write_jsonl(folder / "texts.jsonl", (prose(i, sentences=12) for i in range(300)))
    corpus = finish(make_context(folder, kind="corpus", config=corpus_config(texts), storage=storage))
    config: dict[str, Any] = {"from": {"corpus": "corpus"}, "vocabSize": 400}
    tokenizer = finish(
        make_context(folder, kind="tokenizer", config=config, storage=storage, inputs={"corpus": corpus})
    )
    config = {"from": {"corpus": "corpus", "tokenizer": "tokenizer"}, "validationRatio": 0.1}
    inputs = {"corpus": corpus, "tokenizer": tokenizer}
    shards = finish(make_context(folder, kind="shards", config=config, storage=storage, inputs=inputs))
    block = {
        "from": {"shards": "shards"},
        "model": MODEL,
        "tokens": steps * 8 * 64,
        "sequenceLength": 64,
        "globalBatchSize": 8,
        "precision": "fp32",
        "schedule": {"learningRate": 3e-3, "warmup": 5},
    }
    stage = resolved(storage, "base", {"pretrain": block}, inputs={"shards": shards})
    (ended,) = gang(stage_rank, 1, stage, folder)
    assert not ended.error, ended
    return Base(storage=storage, model=reference(stage, ended), shards=shards)


def resolved(
    storage: Storage,
    name: str,
    stage: dict[str, Any],
    *,
    inputs: dict[str, ArtifactRef],
    attempt: int = 1,
    ranks: int = 1,
) -> ResolvedStage:
    """A stage as the planner resolves it."""
    return ResolvedStage.model_validate(
        {
            "run": "chain",
            "stage": {"name": name, "compute": {"ranksPerNode": ranks}, **stage},
            "attempt": attempt,
            "seed": 3,
            "hash": "d" * 64,
            "inputs": inputs,
            "storage": storage,
            "outputUri": f"{storage.uri}/{name}",
        }
    )


def further(
    base: Base, folder: Path, stage: dict[str, Any], layout: dict[str, int], *, name: str, attempt: int = 1
) -> ResolvedStage:
    """A stage that trains the base further, under a layout, in a storage of its own.

    Args:
        base: what it starts from.
        folder: where the storage is made.
        stage: the typed block under its kind; the layout is added.
        layout: ranks on each axis.
        name: of the stage.
        attempt: its number.
    """
    ((kind, block),) = stage.items()
    axes = {"tensor": layout["tensor"], "pipeline": layout["pipeline"]}
    return resolved(
        base.storage.model_copy(update={"uri": str(folder / "storage")}),
        name,
        {kind: {"parallelism": axes, **block}},
        inputs={"model": base.model},
        attempt=attempt,
        ranks=layout["tensor"] * layout["pipeline"] * layout["data"],
    )


def trained(stage: ResolvedStage, folder: Path) -> list[dict[str, Any]]:
    """Run a stage to its end; its history."""
    ended = gang(stage_rank, stage.stage.compute.world, stage, folder)
    assert not any(e.error for e in ended), ended
    return history(stage)


def pairs_block(data: Path, **fields: Any) -> dict[str, Any]:
    """The block of a stage that learns from the pairs of a file."""
    return {
        "from": {"model": "base"},
        "data": {"sources": [{"uri": str(data)}], "validation": {"fraction": 0.1}},
        "epochs": 1.5,
        "sequenceLength": 128,
        "globalBatchSize": 8,
        "microBatchSize": 2,
        "precision": "fp32",
        "schedule": {"learningRate": 2e-3, "warmup": 2, "decay": "constant"},
        "checkpoint": {"every": 4},
    } | fields


def stage_rank(rank: int, world: int, stage: ResolvedStage, folder: Path, die_at: int | None = None) -> Any:
    """One rank of a stage, to its end; its outcome. The last rank is killed once it has done ``die_at`` steps."""
    from headrace_trainer.stage import StageContext, run_stage

    scratch = folder / f"scratch-{stage.stage.name}-{stage.attempt}"
    ctx = StageContext(resolved=stage, scratch=scratch, rank=rank, world=world, local_rank=rank)
    report = ctx.report

    def report_or_die(**fields: Any) -> None:
        if die_at is not None and rank == world - 1 and fields.get("done", 0) >= die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        report(**fields)

    ctx.report = report_or_die  # type: ignore[method-assign]
    return run_stage(ctx)


def reference(stage: ResolvedStage, ended: Ended) -> ArtifactRef:
    """The artifact that a stage's first rank committed."""
    config = stage.stage.config
    return ArtifactRef(uri=stage.output_uri, digest=ended.value.artifact_digest, kind=config.GIVES)


def history(stage: ResolvedStage) -> list[dict[str, Any]]:
    """The records of a finished stage's steps."""
    path = Path(stage.output_uri) / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
