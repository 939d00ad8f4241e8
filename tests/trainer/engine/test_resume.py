"""A run that was stopped or killed ends with the losses of a run that was not."""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.engine.gangs import (
    BATCH,
    DP2,
    LENGTH,
    PP2,
    TP1,
    TP2,
    TP2_PP2,
    Ended,
    Run,
    began,
    gang,
    losses,
    train,
    train_rank,
)

STEPS, EVERY = 14, 4
LAYOUTS = {"TP2": TP2, "DP2": DP2}


def hexes(run: Run, layout: dict[str, int]) -> list[str]:
    ended = train(run, layout)
    assert not any(e.error for e in ended), ended
    return [record["loss_hex"] for record in ended[0].value.history]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    found: dict[str, list[str]] = {}

    def of(name: str) -> list[str]:
        if name not in found:
            found[name] = hexes(Run(folder=tmp_path_factory.mktemp(name), steps=STEPS), LAYOUTS[name])
        return found[name]

    return of


def ends(pid: int) -> bool:
    """Whether a process is gone, or soon will be."""
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def first_steps(ended: list[Ended]) -> set[Any]:
    return {e.value.first_step for e in ended}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_clean_stop_changes_no_bit(tmp_path: Path, undisturbed: Callable[[str], list[str]], name: str) -> None:
    run = Run(folder=tmp_path, steps=STEPS, stop_at=5, nodes=True)
    stopped = train(run, LAYOUTS[name])
    assert [e.error for e in stopped] == ["Stopped", "Stopped"], stopped
    assert "step 6" in stopped[0].message

    again = train(replace(run, stop_at=None, attempt=2), LAYOUTS[name])
    assert first_steps(again) == {6}
    assert [r["loss_hex"] for r in again[0].value.history] == undisturbed(name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_killing_a_rank_changes_no_bit(tmp_path: Path, undisturbed: Callable[[str], list[str]], name: str) -> None:
    die_at = random.Random(name).randrange(EVERY + 1, STEPS)
    print(f"the last rank of {name} is killed at step {die_at}")
    run = Run(folder=tmp_path, steps=STEPS, every=EVERY, die_at=die_at)
    killed = train(run, LAYOUTS[name])
    assert killed[-1].exit_code == -9
    assert killed[0].error not in ("", "Hung")

    again = train(replace(run, die_at=None, attempt=2), LAYOUTS[name])
    assert first_steps(again) == {(die_at - 1) // EVERY * EVERY}
    assert [r["loss_hex"] for r in again[0].value.history] == undisturbed(name)


@pytest.mark.parametrize(
    ("death", "resumed"),
    [
        ({"die_before": "step-00000008-a1/__0_0.distcp"}, 4),
        ({"die_after": "step-00000008-a1/__0_0.distcp"}, 4),
        ({"die_before": "step-00000008-a1/metadata.json"}, 4),
        ({"die_before": "step-00000008-a1/checkpoint.json"}, 4),
        ({"die_after": "step-00000008-a1/checkpoint.json"}, 8),
    ],
    ids=lambda value: " ".join(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_a_kill_at_any_moment_of_a_save_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path: Path, undisturbed: Callable[[str], list[str]], death: dict[str, str], resumed: int
) -> None:
    run = Run(folder=tmp_path, steps=STEPS, every=EVERY)
    killed = train(replace(run, **death), TP2)  # type: ignore[arg-type]
    assert killed[0].exit_code == -9
    assert ends(int((tmp_path / "writer").read_text())), "nothing goes on writing for a rank that is dead"
    again = train(replace(run, attempt=2), TP2)
    assert first_steps(again) == {resumed}
    assert [r["loss_hex"] for r in again[0].value.history] == undisturbed("TP2")
    assert not list((tmp_path / "storage").rglob("step-00000008-a1/*")), "what was never finished is removed"


def test_training_goes_on_while_a_checkpoint_is_uploaded(
    tmp_path: Path, undisturbed: Callable[[str], list[str]]
) -> None:
    held = {"held": "step-00000008-a1/__0_0.distcp", "released_at": 11}
    assert hexes(Run(folder=tmp_path, steps=STEPS, every=EVERY, **held), TP2) == undisturbed("TP2")  # type: ignore[arg-type]


def test_saves_do_not_pile_up_while_storage_is_away_for_longer_than_their_interval(tmp_path: Path) -> None:
    run = Run(
        folder=tmp_path,
        steps=9,
        overrides={"checkpoint": {"every": "1s"}},
        held="__0_0.distcp",
        released_at=7,
        slow_while_held=True,
    )
    assert len(hexes(run, TP1)) == 9
    assert (tmp_path / "on-their-way").read_text() == "1"


def test_a_stop_commits_the_checkpoint_on_its_way_and_its_own(
    tmp_path: Path, undisturbed: Callable[[str], list[str]]
) -> None:
    run = Run(folder=tmp_path, steps=STEPS, every=EVERY, held="step-00000004-a1/__0_0.distcp", released_at=5, stop_at=5)
    assert train(run, TP2)[0].error == "Stopped"
    committed = sorted(p.parent.name for p in (tmp_path / "storage").rglob("checkpoint.json"))
    assert committed == ["step-00000004-a1", "step-00000006-a1"]
    again = train(replace(run, stop_at=None, attempt=2), TP2)
    assert first_steps(again) == {6}
    assert [r["loss_hex"] for r in again[0].value.history] == undisturbed("TP2")


def test_every_layout_goes_on_from_the_checkpoint_of_a_killed_one(
    tmp_path: Path, undisturbed: Callable[[str], list[str]]
) -> None:
    """Tensor 2 x pipeline 2, then pipeline 2, then data 2, then one rank; each but the last is killed."""
    run = Run(folder=tmp_path, steps=STEPS, every=3)
    for attempt, (layout, die_at) in enumerate([(TP2_PP2, 4), (PP2, 7), (DP2, 10)], start=1):
        killed = train(replace(run, attempt=attempt, die_at=die_at), layout)
        assert killed[-1].exit_code == -9
        assert began(run) == [0, 3, 6][:attempt]
    ended = train(replace(run, attempt=4), TP1)
    assert began(run) == [0, 3, 6, 9]
    assert ended[0].value.message == "resumed after step 9, saved as tensor 1 x pipeline 1 x data 2"
    moved = [record["loss"] for record in ended[0].value.history]
    assert moved == pytest.approx([float.fromhex(h) for h in undisturbed("TP2")], abs=1e-5, rel=0)


# A rate that does not depend on the length, so that a longer run begins like a shorter one.
CONSTANT = {"schedule": {"learningRate": 3e-3, "warmup": 2, "decay": "constant"}}


@pytest.mark.parametrize(
    "overrides",
    [
        {"microBatchSize": 4},
        {"checkpoint": {"every": 3, "keep": 7}},
        {"validation": {"every": 3, "samples": 2}},
        {"tokens": 2 * STEPS * BATCH * LENGTH},
    ],
    ids=lambda overrides: str(next(iter(overrides))),
)
def test_a_change_of_how_it_is_trained_goes_on_where_it_was(
    tmp_path: Path, at_a_constant_rate: list[float], overrides: dict[str, Any]
) -> None:
    run = Run(folder=tmp_path, steps=STEPS, stop_at=5, overrides=CONSTANT)
    assert train(run, TP2)[0].error == "Stopped"
    ended = train(replace(run, attempt=2, stop_at=None, overrides=CONSTANT | overrides), TP2)
    assert first_steps(ended) == {6}
    records = ended[0].value.history
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    assert [r["loss"] for r in records[:STEPS]] == pytest.approx(at_a_constant_rate, abs=1e-5, rel=0)


@pytest.fixture(scope="module")
def at_a_constant_rate(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(Run(folder=tmp_path_factory.mktemp("constant"), steps=STEPS, overrides=CONSTANT), TP2)


def test_bf16_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = hexes(Run(folder=tmp_path / "whole", steps=10, precision="bf16"), TP2)
    run = Run(folder=tmp_path / "cut", steps=10, precision="bf16", stop_at=4)
    assert train(run, TP2)[0].error == "Stopped"
    assert hexes(replace(run, stop_at=None, attempt=2), TP2) == whole


def test_stopping_after_the_last_step_is_not_needed(tmp_path: Path) -> None:
    ended = gang(train_rank, 1, Run(folder=tmp_path, steps=3, stop_at=2), TP1)
    assert ended[0].error == ""
    assert len(ended[0].value.history) == 3
