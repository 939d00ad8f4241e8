"""`plan` lists as skipped what `run` skips: both use the same planner."""

import io
import json
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from rich.console import Console

from builders import START, ended, failed, make_run, manifest, succeeded
from headrace_api.artifact import Artifact, ArtifactFile
from headrace_api.contract import Progress, ResolvedStage
from headrace_api.errors import parse_run
from headrace_api.faults import FaultClass, Outcome
from headrace_api.run import ConditionType, TrainingRun
from headrace_cli.forecast import forecast, table
from headrace_cli.local import prepare
from headrace_operator.brain.observed import LIVE, Attempt, AttemptState, Observed
from headrace_operator.brain.plan import plan

ALL = ("corpus", "tok", "tokens", "base", "eval", "ship", "serve")


@dataclass
class World:
    """A directory for storage, and a body whose agents do their work at once and leave real artifacts."""

    storage: Path
    run: TrainingRun
    attempts: dict[tuple[str, int], Attempt] = field(default_factory=dict)
    worked: list[str] = field(default_factory=list)
    seconds: float = 0

    def observed(self) -> Observed:
        return Observed(now=START + timedelta(seconds=self.seconds), attempts=tuple(self.attempts.values()))

    def go(self, *, until: str | None = None, suspend: bool = False) -> list[str]:
        """``headrace run``, to its end or to the start of a stage; the stages whose agents found work to do."""
        self.worked = []
        self.run = prepare(self.run, self.observed())
        for _ in range(200):
            spec = self.run.spec.model_copy(update={"suspend": suspend or self.run.spec.suspend})
            decided = plan(self.run.model_copy(update={"spec": spec}), self.observed())
            self.run = self.run.model_copy(update={"status": decided.status})
            for key in decided.stop:
                if self.attempts[key.stage, key.number].state in LIVE:
                    self.end(key.stage, failed(FaultClass.STOPPED))
            new = [r for r in decided.start if (r.stage.name, r.attempt) not in self.attempts]
            for resolved in decided.start:
                key = resolved.stage.name, resolved.attempt
                if resolved in new or self.attempts[key].progress is None:
                    self.attempts[key] = self.work(resolved, only_start=until, begun=resolved not in new)
            if until in self.worked or (not new and any(decided.status.condition(c) for c in ConditionType)):
                return self.worked
            self.seconds += decided.requeue_after_seconds or 1
        raise AssertionError("the run did not come to rest")

    def work(self, resolved: ResolvedStage, *, only_start: str | None, begun: bool) -> Attempt:
        name, file = resolved.stage.name, self.storage / resolved.stage.name / "artifact.json"
        attempt = Attempt(stage=name, number=resolved.attempt, hash=resolved.hash, state=AttemptState.RUNNING)
        stored = Artifact.model_validate_json(file.read_text()) if file.exists() else None
        if stored is not None and stored.hash == resolved.hash:
            return ended(attempt, Outcome(artifact_digest=stored.digest))
        self.worked += [] if begun else [name]
        if name == only_start:
            return attempt
        if resolved.stage.kind == "deploy":
            return Attempt(
                **{f: getattr(attempt, f) for f in ("stage", "number", "hash", "state")},
                progress=Progress(stage=name, attempt=resolved.attempt, endpoint="http://127.0.0.1:8000", time=START),
            )
        artifact = Artifact(
            kind=resolved.stage.config.GIVES, run="demo", stage=name, hash=resolved.hash, created_at=START,
            files=[ArtifactFile(path="data", bytes=1, sha256=resolved.hash)], duration_seconds=1,
        )  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(artifact.dump()))
        return ended(attempt, Outcome(artifact_digest=artifact.digest))

    def end(self, stage: str, outcome: Outcome) -> None:
        key = max(k for k, a in self.attempts.items() if k[0] == stage and a.state in LIVE)
        self.attempts[key] = ended(self.attempts[key], outcome)

    def edit(self, **spec: object) -> None:
        status = self.run.status
        self.run = make_run(*ALL, status=status, storage={"uri": str(self.storage)}, **spec)


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path, make_run(*ALL, storage={"uri": str(tmp_path)}))


def nothing_yet(world):
    pass


def everything_is_done_and_the_server_lives(world):
    world.go()


def the_server_died(world):
    world.go()
    world.end("serve", failed(FaultClass.POD))


def the_server_was_stopped(world):
    world.go()
    world.go(suspend=True)


def an_artifact_was_removed(world):
    world.go()
    (world.storage / "tok" / "artifact.json").unlink()


def an_artifact_is_another_one(world):
    world.go()
    file = world.storage / "tokens" / "artifact.json"
    file.write_text(file.read_text().replace('"bytes": 1', '"bytes": 2'))


def the_seed_was_edited(world):
    world.go()
    world.edit(seed=7)


def the_last_command_was_killed_while_pretraining_ran(world):
    world.go(until="base")


def the_command_was_killed_and_pretraining_then_ended(world):
    world.go(until="base")
    world.end("base", succeeded("d" * 64))


def pretraining_was_suspended(world):
    world.go(until="base")
    world.go(suspend=True)


def pretraining_failed_for_good(world):
    world.go(until="base")
    world.end("base", failed(FaultClass.USER))
    world.run = world.run.model_copy(update={"status": plan(world.run, world.observed()).status})


def the_edit_came_while_pretraining_ran(world):
    world.go(until="base")
    world.edit(seed=7)


def the_home_was_lost_and_the_storage_was_not(world):
    world.go()
    world.run, world.attempts = make_run(*ALL, storage={"uri": str(world.storage)}), {}


@pytest.mark.parametrize(
    ("before", "skipped"),
    [
        (nothing_yet, ""),
        (everything_is_done_and_the_server_lives, "corpus tok tokens base eval ship"),
        (the_server_died, "corpus tok tokens base eval ship"),
        (the_server_was_stopped, "corpus tok tokens base eval ship"),
        (an_artifact_was_removed, "corpus tokens base eval ship"),
        (an_artifact_is_another_one, "corpus tok tokens"),
        (the_seed_was_edited, ""),
        (the_last_command_was_killed_while_pretraining_ran, "corpus tok tokens"),
        (the_command_was_killed_and_pretraining_then_ended, "corpus tok tokens base"),
        (pretraining_was_suspended, "corpus tok tokens"),
        (pretraining_failed_for_good, "corpus tok tokens"),
        (the_edit_came_while_pretraining_ran, ""),
        (the_home_was_lost_and_the_storage_was_not, "corpus tok tokens base eval ship"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_plan_and_run_agree_on_what_is_skipped(world, before, skipped):
    before(world)
    rows = forecast(world.run, world.observed())
    said = {r["stage"]: r["action"] for r in rows}
    live = {a.stage for a in world.attempts.values() if a.state in LIVE and a.hash}
    worked = world.go()
    assert [s for s, action in said.items() if action == "skip"] == skipped.split()
    assert [s for s, action in said.items() if action == "run"] == worked
    assert {s for s, action in said.items() if action == "keep"} == live - set(worked)


def test_a_manifest_that_asks_for_suspension_waits(world):
    world.edit(suspend=True)
    assert {r["action"] for r in forecast(world.run, world.observed())} == {"wait"}


def test_an_adapter_is_stated_beside_the_whole_model(tmp_path):
    value = manifest(*ALL[:4], storage={"uri": str(tmp_path)})
    block = {"from": {"model": "base"}, "data": {"sources": [{"uri": "/records"}]}}
    value["spec"]["stages"] += [
        {"name": "whole", "sft": block},
        {"name": "small", "dpo": block | {"adapter": {"lora": {"rank": 8}}}},
    ]
    run = parse_run(value)
    rows = {row["stage"]: row for row in forecast(run, Observed(now=START, attempts=()))}
    whole, small = rows["whole"], rows["small"]
    assert whole["trainedParameters"] == whole["parameters"] == rows["base"]["parameters"]
    assert small["trainedParameters"] == 4 * 8 * ((128 + 256) + (128 + 128) + (128 + 768) + (384 + 128))
    for figure in ("trainedParameters", "stateBytesPerRank", "flopsPerStep"):
        assert small["withoutAdapter"][figure] == whole[figure] > small[figure]
    assert not {"steps", "tokens", "flops"} & whole.keys()
    console = Console(width=500, file=io.StringIO())
    console.print(table("demo", list(rows.values())))
    said = " ".join(console.file.getvalue().split())
    assert "1.9M parameters, of which 65.5k are trained" in said, said
