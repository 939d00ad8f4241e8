"""A run that was stopped or killed ends with the losses of a run that was not."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.engine.gangs import DP2, PP2, TP1, TP2, TP2_PP2, Ended, Run, gang, losses, train, train_rank

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
    die_at = random.Random(name).randrange(EVERY, STEPS)
    print(f"the last rank of {name} is killed at step {die_at}")
    run = Run(folder=tmp_path, steps=STEPS, every=EVERY, die_at=die_at)
    killed = train(run, LAYOUTS[name])
    assert killed[-1].exit_code == -9
    assert killed[0].error not in ("", "Hung")

    again = train(replace(run, die_at=None, attempt=2), LAYOUTS[name])
    assert first_steps(again) == {die_at // EVERY * EVERY}
    assert [r["loss_hex"] for r in again[0].value.history] == undisturbed(name)


def test_dying_in_an_upload_leaves_the_checkpoint_before_it(
    tmp_path: Path, undisturbed: Callable[[str], list[str]]
) -> None:
    run = Run(folder=tmp_path, steps=STEPS, every=EVERY, die_in_upload=8)
    killed = train(run, TP2)
    assert killed[0].exit_code == -9
    assert list((tmp_path / "storage").rglob("step-00000008-a1/*.distcp"))

    again = train(replace(run, die_in_upload=None, attempt=2), TP2)
    assert first_steps(again) == {4}
    assert [r["loss_hex"] for r in again[0].value.history] == undisturbed("TP2")
    assert not list((tmp_path / "storage").rglob("step-00000008-a1/*"))


@pytest.mark.parametrize(
    ("before", "after"),
    [(TP2, DP2), (DP2, PP2), pytest.param(TP2_PP2, TP1, marks=pytest.mark.slow)],
    ids=["TP2-DP2", "DP2-PP2", "TP2xPP2-TP1"],
)
def test_another_layout_takes_over(
    tmp_path: Path, undisturbed: Callable[[str], list[str]], before: dict[str, int], after: dict[str, int]
) -> None:
    run = Run(folder=tmp_path, steps=STEPS, stop_at=6)
    assert train(run, before)[0].error == "Stopped"
    moved = losses(replace(run, stop_at=None, attempt=2), after)
    assert moved == pytest.approx([float.fromhex(h) for h in undisturbed("TP2")], abs=1e-5, rel=0)


def test_bf16_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = hexes(Run(folder=tmp_path / "whole", steps=10, precision="bf16"), TP2)
    run = Run(folder=tmp_path / "cut", steps=10, precision="bf16", stop_at=4)
    assert train(run, TP2)[0].error == "Stopped"
    assert hexes(replace(run, stop_at=None, attempt=2), TP2) == whole


def test_stopping_after_the_last_step_is_not_needed(tmp_path: Path) -> None:
    ended = gang(train_rank, 1, Run(folder=tmp_path, steps=3, stop_at=2), TP1)
    assert ended[0].error == ""
    assert len(ended[0].value.history) == 3
