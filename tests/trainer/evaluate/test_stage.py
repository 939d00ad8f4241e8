"""The evaluate stage on a trained model and real shards: correct metrics, and a report that is consistent."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from headrace_trainer.stages.evaluate.curve import draw_curve
from trainer.evaluate.builders import LENGTH, Trained, evaluate, figures, stream, tokens, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def metrics(trained) -> dict[str, float]:
    """Of an evaluation by one rank; its files are in ``evaluation``."""
    (ended,) = evaluate(trained)
    assert not ended.error, ended
    # Later evaluations replace it in storage.
    shutil.copytree(trained.folder / "storage" / "evaluate", trained.folder / "first")
    return ended.value.metrics


@pytest.fixture(scope="module")
def evaluation(trained, metrics) -> Path:
    return trained.folder / "first"


@pytest.fixture(scope="module")
def report(evaluation) -> str:
    return (evaluation / "report.md").read_text()


def windows(trained: Trained) -> np.ndarray:
    """The tokens of the validation split that are predicted, each once."""
    found = stream(Path(trained.shards.uri), "validation")
    return found[1 : 1 + (len(found) - 1) // LENGTH * LENGTH]


def test_the_model_has_learned_more_than_how_often_tokens_occur(metrics):
    assert metrics["unigramRatio"] > 2
    assert metrics["unigramRatio"] == pytest.approx(metrics["unigramPerplexity"] / metrics["perplexity"])


def test_perplexity_is_exp_of_the_loss(metrics):
    assert metrics["perplexity"] == math.exp(metrics["loss"])
    assert metrics["unigramPerplexity"] == math.exp(metrics["unigramLoss"])


def test_the_baseline_is_the_smoothed_training_counts_on_the_same_tokens(trained, metrics):
    vocab_size = json.loads((Path(trained.shards.uri) / "manifest.json").read_text())["vocab_size"]
    counts = np.bincount(stream(Path(trained.shards.uri), "train"), minlength=vocab_size) + 1
    expected = -np.log(counts / counts.sum())[windows(trained)].mean()
    assert metrics["unigramLoss"] == pytest.approx(expected, abs=1e-9)


def test_every_token_of_every_whole_window_is_predicted_once(trained, metrics):
    assert metrics["tokensIn"] == len(windows(trained))


def test_bits_per_byte_count_the_text_of_the_split(trained, metrics):
    manifest = json.loads((Path(trained.shards.uri) / "manifest.json").read_text())
    per_token = manifest["bytes"]["validation"] / manifest["tokens"]["validation"]
    assert metrics["bitsPerByte"] == pytest.approx(metrics["loss"] / math.log(2) / per_token)


def test_it_agrees_with_what_training_measured(trained, metrics):
    lines = (Path(trained.model.uri) / "history.jsonl").read_text().splitlines()
    assert metrics["loss"] == pytest.approx(json.loads(lines[-1])["validation_loss"], abs=0.2)


def test_two_ranks_measure_what_one_does(trained, metrics):
    ended = evaluate(trained, num_ranks=2)
    assert [e.error for e in ended] == ["", ""], ended
    assert ended[0].value.metrics == pytest.approx(metrics, rel=1e-5)


def test_fewer_tokens_are_read_where_fewer_are_asked_for(trained):
    (ended,) = evaluate(trained, maxTokens=200)
    assert ended.value.metrics["tokensIn"] == 200 // LENGTH * LENGTH


def test_the_printed_perplexity_is_exp_of_the_printed_loss(report, metrics):
    rows = figures(report)
    assert [f"{math.exp(float(loss)):.2f}" for loss, _ in rows] == [shown for _, shown in rows]
    assert [float(loss) for loss, _ in rows] == pytest.approx([metrics["loss"], metrics["unigramLoss"]], abs=1e-6)


def test_the_printed_losses_are_minus_the_logs_of_the_printed_probabilities(report):
    pairs = tokens(report)
    assert len(pairs) == 4 + 12
    assert [f"{-math.log(float(probability)):.3f}" for probability, _ in pairs] == [loss for _, loss in pairs]
    assert {("0.9", "0.105"), ("0.01", "4.605")} <= set(pairs)


def test_the_examples_go_from_expected_to_unexpected(evaluation):
    examples = json.loads((evaluation / "report.json").read_text())["examples"]
    losses = [example["loss"] for example in examples]
    assert losses == sorted(losses)
    assert losses[0] < 0.5
    assert losses[-1] > 3


def test_the_report_has_the_figures_that_the_artifact_has(evaluation, metrics):
    assert json.loads((evaluation / "report.json").read_text())["metrics"] == metrics
    assert json.loads((evaluation / "artifact.json").read_text())["metrics"] == metrics


@pytest.mark.parametrize("steps", [1, 2, 149, 150, 2000])
def test_the_curve_is_drawn_for_short_and_long_trainings(tmp_path, steps):
    import matplotlib.image

    rows = [{"step": s, "loss": 2 + 5 / s, "tokens": 256 * s} for s in range(1, steps + 1)]
    rows[-1]["validation_loss"] = 2.5
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_curve(tmp_path / "history.jsonl", unigram_loss=6, name="a", num_parameters=10**6, out=tmp_path / "a.png")
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    assert pixels[..., :3].std() > 0.05


def test_the_curve_counts_parameters_and_tokens_as_people_do(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    rows = [{"step": s, "loss": 5 / s, "tokens": 50_000 * s} for s in range(1, 41)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_curve(tmp_path / "history.jsonl", unigram_loss=6, name="a", num_parameters=1_835_136, out=tmp_path / "a.png")
    axes = figures[0].axes[0]
    assert axes.get_title(loc="left") == "a: 1.8M parameters"
    tokens = [label.get_text() for axis in axes.child_axes for label in axis.get_xticklabels()]
    assert "1M" in tokens


def test_the_curve_is_part_of_the_artifact(evaluation):
    listed = {f["path"] for f in json.loads((evaluation / "artifact.json").read_text())["files"]}
    assert listed == {"report.json", "report.md", "loss_curve.png"}


def test_what_is_required_and_missed_fails_every_rank_by_name(trained, metrics):
    ended = evaluate(trained, num_ranks=2, require={"unigramRatio": ">=1000", "loss": "<9"})
    assert [e.error for e in ended] == ["UserError", "UserError"]
    value = f"{metrics['unigramRatio']:.4g}"
    assert ended[0].message.startswith(f"evaluate.require.unigramRatio: {value} is not >=1000: train longer")


def test_ranks_that_do_not_divide_the_model_are_refused(trained):
    ended = evaluate(trained, num_ranks=3)
    assert [e.error for e in ended] == ["UserError"] * 3
    assert "compute.ranksPerNode: 3" in ended[0].message
    assert "must divide the model's 4 heads" in ended[0].message


def test_a_request_to_stop_is_heard_by_every_rank(trained):
    assert [e.error for e in evaluate(trained, num_ranks=2, stop=True)] == ["Stopped", "Stopped"]
