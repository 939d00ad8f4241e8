"""A model trained for a few real steps on real shards, and evaluations of it by any number of ranks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace_api.artifact import ArtifactRef, stage_hash
from headrace_api.contract import ResolvedStage
from headrace_api.faults import Outcome
from headrace_api.run import Stage, Storage
from trainer.data.builders import corpus_config, finish, make_context, prose, write_jsonl
from trainer.engine.gangs import Ended, gang

LENGTH = 32
SEED = 7


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The artifacts that an evaluation reads."""

    folder: Path
    shards: ArtifactRef
    model: ArtifactRef


def train(folder: Path, *, steps: int = 40) -> Trained:
    """Prose -> tokenizer -> shards -> a model, trained by two tensor ranks."""
    texts = write_jsonl(folder / "texts.jsonl", (prose(seed, sentences=12) for seed in range(200)))
    corpus = finish(make_context(folder, kind="corpus", config=corpus_config(texts)))
    config: dict[str, Any] = {"from": {"corpus": "corpus"}, "vocabSize": 500}
    tokenizer = finish(make_context(folder, kind="tokenizer", config=config, inputs={"corpus": corpus}))
    config = {"from": {"corpus": "corpus", "tokenizer": "tokenizer"}, "validationRatio": 0.15}
    inputs = {"corpus": corpus, "tokenizer": tokenizer}
    shards = finish(make_context(folder, kind="shards", config=config, inputs=inputs))
    pretrain = {
        "from": {"shards": "shards"},
        "model": {"layers": 2, "hiddenSize": 32, "heads": 4, "kvHeads": 2, "ffnHiddenSize": 64},
        "tokens": steps * 8 * LENGTH,
        "sequenceLength": LENGTH,
        "globalBatchSize": 8,
        "microBatchSize": 8,
        "precision": "fp32",
        "parallelism": {"tensor": 2},
        "schedule": {"learningRate": 1e-2, "warmup": 4},
        "validation": {"every": 20, "samples": 8},
    }
    ended = run_stages(folder, kind="pretrain", config=pretrain, inputs={"shards": shards}, num_ranks=2)
    assert not any(e.error for e in ended), ended
    model = ArtifactRef(
        uri=f"{folder}/storage/pretrain", digest=ended[0].value.artifact_digest or "", kind="checkpoint"
    )
    return Trained(folder=folder, shards=shards, model=model)


def evaluate(trained: Trained, *, num_ranks: int = 1, stop: bool = False, **fields: Any) -> list[Ended]:
    """What each rank of an evaluation ended with; a good one ends with an ``Outcome``.

    Args:
        trained: the model and the shards.
        num_ranks: the size of the gang.
        stop: whether the pod was asked to stop before it began.
        fields: of the typed block.
    """
    config = {"from": {"model": "pretrain", "shards": "shards"}, **fields}
    inputs = {"model": trained.model, "shards": trained.shards}
    return run_stages(trained.folder, kind="evaluate", config=config, inputs=inputs, num_ranks=num_ranks, stop=stop)


def run_stages(
    folder: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    inputs: dict[str, ArtifactRef],
    num_ranks: int,
    stop: bool = False,
) -> list[Ended]:
    """Run a stage from its inputs to its committed artifact."""
    stage = Stage.model_validate({"name": kind, "compute": {"ranksPerNode": num_ranks}, kind: config})
    digests = {slot: ref.digest for slot, ref in inputs.items()}
    resolved = ResolvedStage(
        run="test",
        stage=stage,
        attempt=1,
        seed=SEED,
        hash=stage_hash(stage.config, seed=SEED, inputs=digests),
        inputs=inputs,
        storage=Storage(uri=f"{folder}/storage"),
        output_uri=f"{folder}/storage/{kind}",
    )
    scratch = folder / f"scratch-{kind}-{len(list(folder.glob('scratch-*')))}"
    scratch.mkdir()
    if stop:
        (scratch / "stop").touch()
    return gang(run_rank, num_ranks, resolved, scratch)


def run_rank(rank: int, world: int, resolved: ResolvedStage, scratch: Path) -> Outcome:
    """One rank."""
    from headrace_trainer.stage import StageContext, run_stage

    return run_stage(StageContext(resolved=resolved, scratch=scratch, rank=rank, world=world, local_rank=rank))


def figures(report: str) -> list[tuple[str, str]]:
    """(loss, perplexity) of the model and of the baseline, as they are printed."""
    return re.findall(r"(?:model|baseline) +│ +([0-9.]+) │ +([0-9.]+) │", report)


def tokens(report: str) -> list[tuple[str, str]]:
    """(probability, loss) of every token that is shown, as they are printed."""
    return re.findall(r"│ +([0-9][0-9.e-]*) │ +([0-9]+\.[0-9]{3}) │", report)


def stream(folder: Path, split: str) -> np.ndarray:
    """All tokens of a split, read from the shards' files."""
    return np.concatenate([np.fromfile(path, np.uint16) for path in sorted(folder.glob(f"{split}-*.bin"))])
