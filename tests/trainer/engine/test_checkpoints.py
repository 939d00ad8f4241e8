"""Only what was committed and is whole is resumed from."""

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from headrace_api.artifact import ArtifactFile
from headrace_trainer.engine.checkpoint.manifest import Axes, CheckpointManifest, folder_name, newest_first
from headrace_trainer.engine.checkpoint.store import CheckpointStore
from headrace_trainer.storage import DirectoryStore
from trainer.engine.gangs import TP1, TP2, Run, train


def trained(folder: Path, *, layout: dict[str, int] = TP1, **changes: object) -> Run:
    """A run with committed checkpoints of steps 2 and 4, and more steps to go."""
    run = Run(folder=folder, steps=6, every=2, stop_at=3, **changes)  # type: ignore[arg-type]
    assert train(run, layout)[0].error == "Stopped"
    return replace(run, stop_at=None, attempt=2)


def checkpoint(run: Run, step: int) -> Path:
    return next((run.folder / "storage" / "pretrain" / "checkpoints").rglob(f"step-{step:08d}-*"))


def resumed_at(run: Run) -> int:
    ended = train(run, TP1)
    assert ended[0].error == "", ended
    first_step: int = ended[0].value.first_step
    return first_step


def corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def commit_damage(path: Path, content: bytes) -> None:
    """Change a file of a checkpoint together with its size and digest in the manifest."""
    path.write_bytes(content)
    manifest = json.loads((path.parent / "checkpoint.json").read_text())
    entry = next(f for f in manifest["files"] if f["path"] == path.name)
    entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path.parent / "checkpoint.json").write_text(json.dumps(manifest))


def folders(run: Run) -> list[str]:
    return sorted(p.name for p in (run.folder / "storage" / "pretrain" / "checkpoints").glob("*/*"))


def test_the_newest_is_taken(tmp_path: Path) -> None:
    assert resumed_at(trained(tmp_path)) == 4


def test_one_without_a_manifest_does_not_exist(tmp_path: Path) -> None:
    run = trained(tmp_path)
    (checkpoint(run, 4) / "checkpoint.json").unlink()
    assert resumed_at(run) == 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "manifest"])
def test_a_corrupt_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    run = trained(tmp_path)
    weights = checkpoint(run, 4) / "__0_0.distcp"
    if damage == "flipped":
        corrupt(weights)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    else:
        (checkpoint(run, 4) / "checkpoint.json").write_text("{")
    assert resumed_at(run) == 2


@pytest.mark.parametrize("file", ["__1_0.distcp", ".metadata", "common.pt", "metadata.json"])
def test_one_that_cannot_be_loaded_is_passed_over_on_every_rank(tmp_path: Path, file: str) -> None:
    run = replace(trained(tmp_path, layout=TP2), every=1000)
    path = checkpoint(run, 4) / file
    commit_damage(path, b"x" * path.stat().st_size)
    ended = train(run, TP2)
    assert [e.error for e in ended] == ["", ""], ended
    assert [e.value.first_step for e in ended] == [2, 2]
    assert json.loads((path.parent / "corrupt.json").read_text())["reason"]


def test_corrupt_ones_do_not_push_out_good_ones(tmp_path: Path) -> None:
    run = trained(tmp_path, overrides={"checkpoint": {"every": 2, "keep": 2}})
    corrupt(checkpoint(run, 4) / "__0_0.distcp")
    once_more = {"checkpoint": {"every": 5, "keep": 2}}
    run = replace(run, overrides=once_more, stop_at=4)
    assert train(run, TP1)[0].error == "Stopped"
    assert folders(run) == ["step-00000002-a1", "step-00000004-a1", "step-00000005-a2"]
    corrupt(checkpoint(run, 5) / "__0_0.distcp")
    assert resumed_at(replace(run, stop_at=None, attempt=3)) == 2


def test_one_that_was_corrupt_is_the_last_resort(tmp_path: Path) -> None:
    run = trained(tmp_path)
    good = (checkpoint(run, 4) / "__0_0.distcp").read_bytes()
    for step in (2, 4):
        corrupt(checkpoint(run, step) / "__0_0.distcp")
    assert train(run, TP1)[0].error == "StorageError"
    (checkpoint(run, 4) / "__0_0.distcp").write_bytes(good)
    assert resumed_at(run) == 4


def test_none_that_is_whole_is_a_storage_error(tmp_path: Path) -> None:
    run = trained(tmp_path)
    for step in (2, 4):
        corrupt(checkpoint(run, step) / "__0_0.distcp")
    ended = train(run, TP2)
    assert [e.error for e in ended] == ["StorageError", "StorageError"]
    assert "none of the 2 committed checkpoints can be loaded" in ended[1].message
    assert "__0_0.distcp: its digest is not the one in the manifest" in ended[1].message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 8}, "seed: 7 there, 8 here"),
        ({"shards_digest": "e" * 64}, "inputs.shards: dddddddddddd there, eeeeeeeeeeee here"),
        ({"learning_rate": 1e-3}, "schedule.learningRate: 0.003 there, 0.001 here"),
        ({"model": {"layers": 2}}, "model.layers: 4 there, 2 here"),
        ({"steps": 3}, "tokens: this run ends at step 3"),
    ],
    ids=["seed", "data", "learning rate", "model", "fewer tokens"],
)
def test_unfinished_work_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    run = trained(tmp_path)
    before = folders(run)
    ended = train(replace(run, **change), TP2)
    assert [e.error for e in ended] == ["UserError", "UserError"]
    assert named in ended[1].message
    assert "onMismatch to restart" in ended[1].message
    assert folders(run) == before


def test_it_is_left_where_it_is_where_a_restart_is_asked_for(tmp_path: Path) -> None:
    run = trained(tmp_path)
    other = replace(run, seed=8, overrides={"checkpoint": {"every": 2, "keep": 9, "onMismatch": "restart"}})
    ended = train(replace(other, stop_at=2), TP1)
    assert ended[0].error == "Stopped"
    assert resumed_at(replace(other, attempt=3)) == 3, "the second training has checkpoints of its own"
    assert resumed_at(replace(run, attempt=4)) == 4, "and the first one can be gone back to"


def test_work_that_was_finished_does_not_hinder_another(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, steps=4)
    assert train(run, TP1)[0].error == ""
    again = train(replace(run, attempt=2, shards_digest="e" * 64), TP1)[0].value
    assert again.first_step == 0
    assert again.message.startswith("began at step 0: the checkpoint of step 4 of 4")
    assert "inputs.shards: dddddddddddd there, eeeeeeeeeeee here" in again.message


def test_as_many_are_kept_as_asked_for(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, steps=9, every=2, overrides={"checkpoint": {"every": 2, "keep": 2}})
    assert train(run, TP1)[0].error == ""
    assert folders(run) == ["step-00000008-a1", "step-00000009-a1"]


def test_an_attempt_that_was_taken_for_dead_removes_nothing_of_a_later_one(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)

    def commit(step: int, attempt: int) -> None:
        folder = CheckpointStore(store, "checkpoints")
        name = folder.new_name(step, attempt)
        store.put_bytes(folder.key(name, "__0_0.distcp"), b"weights")
        folder.commit(name, manifest(step, attempt), keep=1)

    commit(4, 2)
    store.put_bytes("checkpoints/step-00000006-a2/__0_0.distcp", b"on its way")
    commit(6, 1)
    commit(8, 1)
    assert store.exists("checkpoints/step-00000004-a2/checkpoint.json")
    assert store.exists("checkpoints/step-00000006-a2/__0_0.distcp")
    assert not store.exists("checkpoints/step-00000006-a1/checkpoint.json"), "its own are removed as ever"
    commit(9, 2)
    assert {info.key.split("/")[1] for info in store.list("checkpoints/")} == {"step-00000009-a2"}


def test_a_protected_step_stays_until_another_is_committed_in_its_place(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    folder = CheckpointStore(store, "checkpoints")

    def commit(step: int, protect: int | None) -> set[str]:
        name = folder.new_name(step, 1)
        store.put_bytes(folder.key(name, "__0_0.distcp"), b"weights")
        folder.commit(name, manifest(step, 1), keep=1, protect=protect)
        return {name.removeprefix("step-0000000") for name in folder.committed()}

    assert commit(2, None) == {"2-a1"}
    assert commit(3, 3) == {"3-a1"}
    assert commit(4, 3) == {"3-a1", "4-a1"}
    assert commit(6, 3) == {"3-a1", "6-a1"}
    assert commit(6, 3) == {"3-a1", "6-a1-1"}
    assert commit(8, 8) == {"8-a1"}


def manifest(step: int, attempt: int) -> CheckpointManifest:
    return CheckpointManifest(
        stage="base",
        identity={},
        attempt=attempt,
        step=step,
        steps=100,
        consumed_samples=step,
        layout=Axes(tensor=1, pipeline=1, data=1),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        files=[ArtifactFile(path="__0_0.distcp", bytes=7, sha256=hashlib.sha256(b"weights").hexdigest())],
    )


def test_a_finished_run_has_only_its_model_to_deliver(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, steps=5, every=2)
    first = train(run, TP1)[0].value
    again = train(replace(run, attempt=2), TP1)[0].value
    assert again.first_step == 5
    assert again.history == first.history
    assert folders(run) == ["step-00000004-a1", "step-00000005-a1"]


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    folder = checkpoint(trained(tmp_path), 4)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    assert (manifest["step"], manifest["steps"], manifest["consumedSamples"]) == (4, 6, 32)
    assert manifest["identity"]["seed"] == 7
    assert manifest["identity"]["inputs"] == {"shards": "d" * 64}
    assert manifest["identity"]["config"]["model"]["layers"] == 4
    assert manifest["layout"] == {"tensor": 1, "pipeline": 1, "data": 1}
    names = {f["path"] for f in manifest["files"]}
    assert names == {p.name for p in folder.iterdir()} - {"checkpoint.json"}
    assert {"__0_0.distcp", ".metadata", "metadata.json", "common.pt", "history.jsonl"} <= names


def test_folder_names_are_never_used_twice() -> None:
    assert folder_name(40, 2) == "step-00000040-a2"
    assert folder_name(40, 2, taken={"step-00000040-a2"}) == "step-00000040-a2-1"


def test_folders_are_ordered_by_step_then_attempt() -> None:
    names = ["step-00000008-a1", "step-00000100-a1", "step-00000100-a12", "step-00000100-a2-1", "step-00000100-a2", "x"]
    assert newest_first(names) == [
        "step-00000100-a12",
        "step-00000100-a2-1",
        "step-00000100-a2",
        "step-00000100-a1",
        "step-00000008-a1",
    ]
