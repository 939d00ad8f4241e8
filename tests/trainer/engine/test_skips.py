"""Losses that are not finite: a step is skipped within a budget, then an older checkpoint is taken, then people decide."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace_api.stages.training import NonFinite
from headrace_trainer.engine.skips import Verdict, judge, last_update
from trainer.engine.gangs import DP2, TP2, Run, gang, joined, train

STEPS = 14


def history(text: str) -> list[dict[str, Any]]:
    """A letter a step: . for an update, s for a skipped step, r for one that was taken back, x for both."""
    marks: dict[str, dict[str, Any]] = {
        ".": {"loss": 1.0},
        "s": {"skipped": "why"},
        "r": {"loss": 1.0, "rolled_back": True},
        "x": {"skipped": "why", "rolled_back": True},
    }
    return [{"step": i, **marks[letter]} for i, letter in enumerate(text, start=1)]


@pytest.mark.parametrize(
    ("steps", "verdict"),
    [
        ("..s", Verdict.GO_ON),
        ("..sss", Verdict.GO_ON),
        ("..ssss", Verdict.ROLL_BACK),
        ("..sss.sss.sss.s", Verdict.GO_ON),
        ("..sss.sss.sss.ss", Verdict.ROLL_BACK),
        ("..sss.sss.sss" + 1000 * "." + "ss", Verdict.GO_ON),
        ("..rxxxx.sss", Verdict.GO_ON),
        ("..rxxxxsss", Verdict.GO_ON),
        ("..rxxxx.ssss", Verdict.GIVE_UP),
        ("..rxxxx" + 1000 * "." + "ssss", Verdict.ROLL_BACK),
    ],
)
def test_the_history_decides(steps: str, verdict: Verdict) -> None:
    budget = NonFinite.model_validate({"maxInARow": 3, "maxPer1000Steps": 10})
    assert judge(history(steps), budget) is verdict


@pytest.mark.parametrize(("steps", "update"), [("", 0), ("..s", 2), ("..rxss", 2), ("ss", 0)])
def test_the_weights_are_those_of_the_last_update_that_was_kept(steps: str, update: int) -> None:
    assert last_update(history(steps)) == update


def digests(rank: int, world: int, run: Run, layout: dict[str, int]) -> list[str]:
    """A digest of weights, moments and the optimizer's step after each step."""

    def trained(loop: Any, _ctx: Any, _card: Any) -> list[str]:
        import hashlib

        from headrace_trainer.engine.checkpoint.optimizer_state import sharded_moments

        def digest() -> str:
            loop.stepper.gather_weights()
            model = loop.state.model.sharded_state_dict(metadata={"singleton_local_shards": False})
            moments = sharded_moments(loop.state.optimizer, model)
            found = hashlib.sha256(repr([g.get("step") for g in loop.state.optimizer.param_groups]).encode())
            for tensor in (*loop.state.model.parameters(), *(moments[name].data for name in sorted(moments))):
                found.update(tensor.detach().contiguous().view(-1).numpy().tobytes())
            return found.hexdigest()

        loop.resume()
        found = []
        while loop.step < loop.steps:
            loop.advance()
            found.append(digest())
        return found

    found: list[str] = joined(rank, world, run, layout, trained)
    return found


@pytest.mark.parametrize("layout", [TP2, DP2], ids=["TP2", "DP2"])
def test_a_skipped_step_changes_nothing_on_any_rank(tmp_path: Path, layout: dict[str, int]) -> None:
    ended = gang(digests, 2, Run(folder=tmp_path, steps=6, bad_steps=(3,)), layout)
    assert [e.error for e in ended] == ["", ""], ended
    for found in (e.value for e in ended):
        assert found[3] == found[2]
        assert len(set(found)) == 5


def test_a_skipped_step_is_counted_and_training_goes_on(tmp_path: Path) -> None:
    ended = train(Run(folder=tmp_path, steps=8, bad_steps=(3, 5)), DP2)
    assert [e.error for e in ended] == ["", ""], ended
    trained = ended[0].value
    assert [r["step"] for r in trained.history] == list(range(1, 9))
    assert [r["step"] for r in trained.history if "skipped" in r] == [4, 6]
    assert trained.history[3]["skipped"] == "the gradient norm is nan"
    assert all(math.isfinite(r["loss"]) for r in trained.history if "skipped" not in r)
    assert trained.message.startswith("skipped step 6: the gradient norm is nan; 2 steps left out so far")
    assert trained.metrics["skippedSteps"] == 2


ROLLED_BACK = Run(folder=Path(), steps=STEPS, every=3, bad_steps=(6, 7, 8, 9))
"""Four in a row, one more than may be: checkpoints are of steps 3 and 6, and that of 3 is the newest with other weights."""


def test_too_many_in_a_row_take_older_weights_and_leave_the_data_out(tmp_path: Path) -> None:
    ended = train(replace(ROLLED_BACK, folder=tmp_path), DP2)
    assert [e.error for e in ended] == ["", ""], ended
    trained = ended[0].value
    assert [r["step"] for r in trained.history if "rolled_back" in r] == [4, 5, 6, 7, 8, 9, 10]
    assert [r["step"] for r in trained.history if "skipped" in r] == [7, 8, 9, 10]
    assert trained.message == "took back the updates of steps 4 to 10, and left their data out"
    assert (trained.metrics["steps"], trained.metrics["skippedSteps"]) == (STEPS, 7)


@pytest.mark.parametrize(
    ("die_at", "resumed"), [(8, 6), (10, 6), (12, 10)], ids=["in the row", "after the return", "later"]
)
def test_a_run_that_is_killed_skips_and_goes_back_as_one_that_is_not(tmp_path: Path, die_at: int, resumed: int) -> None:
    whole = train(replace(ROLLED_BACK, folder=tmp_path / "whole"), DP2)[0].value
    run = replace(ROLLED_BACK, folder=tmp_path / "killed")
    assert train(replace(run, die_at=die_at), DP2)[-1].exit_code == -9
    again = train(replace(run, attempt=2), DP2)
    assert [e.error for e in again] == ["", ""], again
    assert again[0].value.first_step == resumed
    assert again[0].value.history == whole.history


def test_what_an_older_checkpoint_does_not_help_is_an_error_for_people(tmp_path: Path) -> None:
    run = replace(ROLLED_BACK, folder=tmp_path, steps=20, bad_steps=(6, 7, 8, 9, 12, 13, 14, 15))
    ended = train(run, DP2)
    assert [e.error for e in ended] == ["UserError", "UserError"]
    assert "step 16: the gradient norm is nan, once more than nonFinite allows" in ended[1].message
    assert "an older checkpoint did not help: lower schedule.learningRate (0.003)" in ended[1].message


def test_a_larger_budget_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, steps=12, every=4, bad_steps=(4, 5, 6), overrides={"nonFinite": {"maxInARow": 0}})
    assert "is not there" in train(replace(run, every=5), DP2)[0].message
    ended = train(replace(run, attempt=2, overrides={}), DP2)
    assert [e.error for e in ended] == ["", ""], ended
