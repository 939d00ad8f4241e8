"""One run from manifest to completion, with every status and event, compared with golden/story.yaml.

HEADRACE_WRITE_GOLDEN=1 writes the file anew; what changes then is to be read.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from builders import START, failed, make_run, succeeded
from headrace_api.faults import FaultClass, Outcome
from headrace_api.run import SavedCheckpoint
from headrace_operator.brain.observed import AttemptState, Held
from headrace_operator.brain.plan import Plan
from plan.body import Body

GOLDEN = Path(__file__).with_name("golden") / "story.yaml"
Json = dict[str, Any]
HERE = "http://demo--serve.default.svc:8000"
PENDING, RUNNING = AttemptState.PENDING, AttemptState.RUNNING
SAVED = SavedCheckpoint(step=100, uri="/store/base/checkpoints/100", time=START)


def later(seconds: float, act: Callable[[Body], object]) -> Callable[[Body], object]:
    def then(it: Body) -> None:
        it.seconds += seconds
        act(it)

    return then


def edit(**compute: Any) -> Callable[[Body], object]:
    def act(it: Body) -> None:
        stages = it.run.spec.dump()["stages"]
        stages[3]["compute"] = {"ranksPerNode": 2, **compute}
        ask(it, stages=stages)

    return act


def ask(it: Body, **spec: Any) -> None:
    it.change(**spec)
    it.generation(it.run.metadata.generation + 1)
    it.step()


def refused(it: Body) -> None:
    it.refuse(Outcome(fault=FaultClass.CAPACITY, reason="QuotaExceeded", message="pods=1"), in_part=False)


def no_longer_refused(it: Body) -> None:
    it.refusals = ()
    it.step()


def deleted(it: Body) -> None:
    now = START + timedelta(seconds=it.seconds)
    it.run = it.run.model_copy(update={"metadata": it.run.metadata.model_copy(update={"deletion_timestamp": now})})
    it.step()


TURNS: dict[str, Callable[[Body], object]] = {
    "it is planned": lambda it: None,
    "a pod is missing": later(1, lambda it: it.see(state=PENDING, missing="0 of 1 pods exist")),
    "no node has room": later(5, lambda it: it.see(held=Held(reason="Unschedulable", message="no room"))),
    "its pod runs": later(60, lambda it: it.see(state=RUNNING, held=None, missing="")),
    "it reports": later(10, lambda it: it.report(phase="Running", done=3, unit="documents", message="reading a.warc")),
    "the corpus is made": later(10, lambda it: it.end(succeeded("c", documentsOut=12, bytesOut=12345))),
    "the next has finished, and has not said what it left": later(9, lambda it: it.see(state=AttemptState.SUCCEEDED)),
    "it says so": later(3, lambda it: it.end(succeeded("t"))),
    "the quota is used up": later(1, refused),
    "it still is, after an hour": later(3600, lambda it: it.step()),
    "it no longer is": later(15, no_longer_refused),
    "the shards are made": later(5, lambda it: it.end(succeeded("s"))),
    "the ranks load": later(5, lambda it: it.report(phase="Loading", total=400)),
    "they train": later(60, lambda it: it.report(phase="Running", done=120, total=400, loss=3.21456, tokensPerSecond=12345.6, etaSeconds=200.4, checkpoint=SAVED)),
    "a pod is evicted": later(5, lambda it: it.end(failed(FaultClass.POD, reason="Evicted", message="by its node"))),
    "the next attempt is evicted too": later(9, lambda it: it.end(failed(FaultClass.POD, reason="Evicted", message="again"))),
    "it waits": later(1, lambda it: it.step()),
    "it has waited": later(1, lambda it: it.step()),
    "the third goes on": later(9, lambda it: it.report(phase="Running", done=101, total=400, loss=3.3)),
    "the third is far ahead": later(60, lambda it: it.report(phase="Running", done=350, total=400, loss=2.9)),
    "the user asks for more memory": later(5, edit(memory="8Gi")),
    "it has saved and ended": later(9, lambda it: it.end(failed(FaultClass.STOPPED))),
    "the user suspends it": later(9, lambda it: ask(it, suspend=True)),
    "that has saved and ended too": later(9, lambda it: it.end(failed(FaultClass.STOPPED))),
    "a day later the user resumes it": later(86_400, lambda it: ask(it, suspend=False)),
    "its image is not there": later(5, lambda it: it.see(state=PENDING, held=Held(reason="ErrImagePull", message="no such image", since=START + timedelta(seconds=it.seconds)))),
    "its image is there": later(5, lambda it: it.see(state=RUNNING, held=None)),
    "a record is bad": later(5, lambda it: it.end(failed(FaultClass.USER, reason="BadRecord", message="line 7 is not JSON"))),
    "it stays failed": later(60, lambda it: it.step()),
    "the user asks for even more memory": later(5, edit(memory="16Gi")),
    "the model is trained": later(5, lambda it: it.end(succeeded("b", loss=2.71828, tokens=1_001_472, steps=489))),
    "the model is exported": later(5, lambda it: it.end(succeeded("x"))),
    "the server answers": later(5, lambda it: it.report(phase="Serving", endpoint=HERE)),
    "its node is drained": later(5, lambda it: it.see(state=PENDING, held=Held(reason="Unschedulable", message="no GPU"), progress=None)),
    "it ends by itself": later(9, lambda it: it.end(Outcome())),
    "the run is deleted": later(9, deleted),
}  # fmt: skip


def flat(value: Any, path: str = "") -> Json:
    """Every plain value of a status by its path; stages by their names."""
    if isinstance(value, list):
        value = {str(v.get("name") or v.get("type")): v for v in value}
    if isinstance(value, dict) and value:
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{path}.{name}".lstrip(".")).items()}
    return {path: value}


def told() -> list[Json]:
    """What each turn changes in the status, and what it makes a body do."""
    run = make_run("corpus", "tok", "tokens", "base", "ship", "serve", restartPolicy={"maxInfraRestarts": 3})
    metadata = run.metadata.model_copy(update={"uid": "uid-of-demo", "generation": 1})
    it = Body(run=run.model_copy(update={"metadata": metadata}))
    it.step()
    story: list[Json] = []
    names: dict[str, str] = {}
    before: Json = {}
    for turn, act in TURNS.items():
        act(it)
        assert it.last is not None
        after = {k: _named(k, v, names) for k, v in flat(it.run.status.dump()).items()}
        changes = {k: after.get(k) for k in {**before, **after} if before.get(k) != after.get(k)}
        story.append({"turn": turn, "status": changes, **_does(it.last)})
        before = after
    return story


def _named(path: str, value: Any, names: dict[str, str]) -> Any:
    """Digests are numbered as they come up: a new field of the spec changes them all."""
    field = path.rpartition(".")[2]
    return (
        names.setdefault(value, f"{field} {len(names) + 1}")
        if field in ("hash", "digest") and len(value) == 64
        else value
    )


def _does(plan: Plan) -> Json:
    done = {
        "start": [f"{r.stage.name} {r.attempt}" for r in plan.start],
        "stop": [f"{k.stage} {k.number} {k.uid}" for k in plan.stop],
        "events": [f"{e.type} {e.reason}: {e.message}" for e in plan.events],
        "again": plan.requeue_after_seconds,
    }
    return {k: v for k, v in done.items() if v not in ([], None)}


def test_a_run_is_told_as_it_is_written_down() -> None:
    story = told()
    if os.environ.get("HEADRACE_WRITE_GOLDEN"):
        GOLDEN.write_text(yaml.safe_dump(story, sort_keys=False, width=120))
    written = yaml.safe_load(GOLDEN.read_text())
    for turn, wanted in zip(story, written, strict=True):
        assert turn == wanted
