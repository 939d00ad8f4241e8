"""The picture of a training: every figure of its history, in the panel where it belongs."""

import json

import pytest

from headrace_trainer.formats.pictures import draw_history, history_figure

PAIRS = {
    "rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/accuracies": 0.75, "rewards/margins": 1.0,
    "logps/chosen": -20.0, "logps/rejected": -30.0,
}  # fmt: skip
SCORES = {"accuracy": 0.75, "margin": 1.0, "mean_reward": 0.1}


def history(count, *, figures):
    rows = []
    for step in range(1, count + 1):
        rows.append({"step": step, "loss": 1 / step, "loss_hex": "0x", "grad_norm": 1.0, "lr": 1e-3, "tokens": step})
        rows[-1] |= {name: value * step for name, value in figures.items()}
        if step % 10 == 0:
            rows[-1] |= {f"validation_{name}": value for name, value in {"loss": 0.5, **figures}.items()}
    return rows


def lines_of(figure):
    """Panel title -> label of a line -> its values."""
    return {
        axes.get_title(loc="left"): {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
        for axes in figure.axes
    }


def test_each_figure_of_preference_training_is_on_the_scale_where_it_belongs():
    found = lines_of(history_figure(history(20, figures=PAIRS), name="dpo"))
    assert list(found) == [
        "loss", "pairs whose chosen side wins", "margin of the chosen side", "implicit reward",
        "log-probability, nats an answer", "grad norm",
    ]  # fmt: skip
    assert found["implicit reward"]["chosen"][-1] == 10
    assert found["implicit reward"]["rejected"][-1] == -10
    assert found["log-probability, nats an answer"]["held out, chosen"] == [-20, -20]
    assert found["loss"]["held out"] == [0.5, 0.5]


def test_the_sides_of_a_pair_have_colours_of_their_own_held_out_too():
    panel = next(
        a for a in history_figure(history(20, figures=PAIRS), name="dpo").axes if "reward" in a.get_title(loc="left")
    )
    colours = {line.get_label(): line.get_color() for line in panel.get_lines()}
    assert colours["chosen"] == colours["held out, chosen"] != colours["rejected"] == colours["held out, rejected"]


def test_a_figure_that_nobody_has_named_has_a_panel_of_its_own():
    found = lines_of(history_figure(history(20, figures={**SCORES, "entropy": 2.0}), name="rl"))
    assert {"pairs whose chosen side wins", "margin of the chosen side", "mean reward", "entropy"} <= set(found)
    assert found["entropy"]["training"][0] == 2


@pytest.mark.parametrize("count", [1, 2, 149, 150, 2000])
@pytest.mark.parametrize("figures", [{}, PAIRS], ids=["sft", "dpo"])
def test_short_and_long_histories_with_skipped_steps_are_drawn(tmp_path, count, figures):
    rows = history(count, figures=figures)
    if count > 1:
        rows[0] = {"step": 1, "skipped": "the loss is nan", "lr": 1e-3, "tokens": 1}
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for out in ("a.png", "b.png"):
        draw_history(path, name="sft", out=tmp_path / out)
    drawn = (tmp_path / "a.png").read_bytes()
    assert drawn[:8] == b"\x89PNG\r\n\x1a\n"
    assert drawn == (tmp_path / "b.png").read_bytes(), "an artifact's digest would change"
