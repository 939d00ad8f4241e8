"""Constitutional stages and what they leave, rank by rank."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from headrace_api.artifact import ARTIFACT_FILE, ArtifactRef
from headrace_api.contract import ResolvedStage
from trainer.engine.gangs import TP1, Ended, gang
from trainer.posttrain.chain import Base, reference, resolved, stage_rank, write_records
from trainer.posttrain.constitutional.critics import Json
from trainer.posttrain.constitutional.synthetic import (
    MEND,
    TRAINED,
    prompt,
)

PROMPTS = TRAINED[:40]
SFT: Json = {
    "sequenceLength": 128,
    "globalBatchSize": 8,
    "microBatchSize": 4,
    "precision": "fp32",
    "checkpoint": {"every": 1000},
}


def stage(
    base: Base,
    folder: Path,
    name: str,
    block: Json,
    layout: dict[str, int] = TP1,
    *,
    attempt: int = 1,
    **inputs: ArtifactRef,
) -> ResolvedStage:
    """A stage in a storage of its own."""
    ((kind, fields),) = block.items()
    axes = {"tensor": layout["tensor"], "pipeline": layout["pipeline"]}
    return resolved(
        base.storage.model_copy(update={"uri": str(folder / "storage")}),
        name,
        {kind: {"parallelism": axes, **fields}},
        inputs=inputs,
        attempt=attempt,
        ranks=layout["tensor"] * layout["pipeline"] * layout["data"],
    )


def cai(
    base: Base,
    folder: Path,
    layout: dict[str, int] = TP1,
    *,
    prompts: Any = None,
    attempt: int = 1,
    name: str = "cai",
    inputs: dict[str, ArtifactRef],
    **fields: Any,
) -> ResolvedStage:
    """A constitutional stage."""
    asked = [{"prompt": prompt(pair)} for pair in PROMPTS] if prompts is None else prompts
    # The report names the file, so what is compared reads the same one.
    data = write_records((Path(base.storage.uri) if prompts is None else folder) / f"{name}.jsonl", asked)
    block: Json = {
        "from": {slot: slot for slot in inputs},
        "data": {"sources": [{"uri": str(data)}]},
        "constitution": {"version": "1", "principles": [MEND]},
        "maxNewTokens": 8,
        "critic": {"maxNewTokens": 8} | fields.pop("critic", {}),
        "sequenceLength": 128,
        "precision": "fp32",
        "promptsAtOnce": 10,
    } | fields
    return stage(base, folder, name, {"constitutional": block}, layout, attempt=attempt, **inputs)


def rank_in_trouble(rank: int, world: int, made: ResolvedStage, folder: Path, trouble: Json) -> Any:
    """One rank of the stage. ``die_at``: the last rank is killed once so many prompts are done; ``die_keeping``: the first
    rank, before it stores so manieth unit of this attempt; ``stop_at``: it is asked to stop once so many are done."""
    from headrace_trainer import board
    from headrace_trainer.stages.constitutional.units import KeptUnits

    counter = board.Counter()
    board.beat_on(counter)
    keep, kept = KeptUnits.keep, [0]

    def keep_or_die(self: Any, *args: Any) -> None:
        kept[0] += 1
        if kept[0] == trouble.get("die_keeping"):
            os.kill(os.getpid(), signal.SIGKILL)
        keep(self, *args)
        (folder / f"kept-{made.attempt}").write_text(str(kept[0]))
        if kept[0] == trouble.get("stop_at"):
            (folder / f"scratch-{made.stage.name}-{made.attempt}" / "stop").touch()

    KeptUnits.keep = keep_or_die  # type: ignore[method-assign]
    outcome = stage_rank(rank, world, made, folder, trouble.get("die_at"))
    (folder / f"beats-{rank}").write_text(str(counter.beats))
    return outcome


def run(made: ResolvedStage, folder: Path, **trouble: Any) -> list[Ended]:
    return gang(rank_in_trouble, made.stage.compute.world, made, folder, trouble)


def done(made: ResolvedStage, folder: Path, **trouble: Any) -> ArtifactRef:
    """Run a stage to its end; its artifact."""
    ended = run(made, folder, **trouble)
    assert not any(e.error for e in ended), ended
    return reference(made, ended[0])


def failed(made: ResolvedStage, folder: Path) -> str:
    """Why a stage failed, as its user is told."""
    ended = run(made, folder)
    assert {e.error for e in ended} == {"UserError"}, ended
    return ended[0].message


def rows(ref: ArtifactRef, file: str = "transcripts.jsonl") -> list[Json]:
    return [json.loads(line) for line in (Path(ref.uri) / file).read_text().splitlines()]


def metrics(ref: ArtifactRef) -> dict[str, float]:
    found: dict[str, float] = json.loads((Path(ref.uri) / ARTIFACT_FILE).read_text())["metrics"]
    return found


def digests(ref: ArtifactRef) -> dict[str, str]:
    """The content of every file."""
    files = json.loads((Path(ref.uri) / ARTIFACT_FILE).read_text())["files"]
    return {file["path"]: file["sha256"] for file in files}
