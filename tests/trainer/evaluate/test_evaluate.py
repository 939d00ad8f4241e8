"""The numbers that the evaluate stage prints, and its requirements."""

import io
import math
import re

import numpy as np
import pytest
from rich.console import Console

from headrace_api.stages import Evaluate
from headrace_trainer.errors import UserError
from headrace_trainer.stages.evaluate.measures import bits_per_byte, perplexity, surprisal
from headrace_trainer.stages.evaluate.report import Example, examples_table, figures_table
from headrace_trainer.stages.evaluate.stage import check_requirements
from headrace_trainer.stages.evaluate.unigram import unigram_losses


def _printed(table) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize(("probability", "loss"), [(0.9, "0.105"), (0.01, "4.605"), (0.5, "0.693"), (1.0, "0.000")])
def test_the_loss_of_a_token_is_minus_the_log_of_its_probability(probability, loss):
    assert f"{surprisal(probability):.3f}" == loss


def test_minus_log_of_one_in_a_hundred_is_four_point_six():
    assert f"{surprisal(0.01):.1f}" == "4.6"


@pytest.mark.parametrize("equally_likely", [2, 10, 50_257])
def test_perplexity_counts_equally_likely_tokens(equally_likely):
    assert perplexity(surprisal(1 / equally_likely)) == pytest.approx(equally_likely)


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    per_byte = bits_per_byte(math.log(256), bytes_per_token=1.0)
    assert per_byte == pytest.approx(8.0)
    assert bits_per_byte(4 * math.log(256), bytes_per_token=4.0) == pytest.approx(per_byte)


def test_every_printed_loss_belongs_to_the_probability_printed_beside_it():
    examples = [Example(context="a [b] c", token=" d", probability=p) for p in (0.987654, 0.1234567, 3.2e-5)]
    text = _printed(examples_table(examples))
    pairs = re.findall(r"([0-9][0-9.e-]*) │ +([0-9]+\.[0-9]{3}) │", text)
    assert len(pairs) == 7
    for probability, loss in pairs:
        assert f"{-math.log(float(probability)):.3f}" == loss
    assert ("0.9", "0.105") in pairs
    assert ("0.01", "4.605") in pairs
    assert "a [b] c" in text


def test_every_printed_perplexity_is_exp_of_the_loss_printed_beside_it():
    metrics = {"loss": 2.5, "unigramLoss": 6.25, "bitsPerByte": 1.1, "unigramRatio": perplexity(3.75)}
    text = _printed(figures_table(metrics))
    rows = re.findall(r"(?:model|baseline) +│ +([0-9.]+) │ +([0-9.]+) │", text)
    assert [f"{math.exp(float(loss)):.2f}" for loss, _ in rows] == [shown for _, shown in rows]
    assert len(rows) == 2


def test_the_baseline_is_the_entropy_of_the_counts_when_the_text_has_the_same_frequencies():
    counts = np.array([1000, 2000, 5000], dtype=np.int64)
    tokens = np.repeat(np.arange(3), counts)
    probabilities = counts / counts.sum()
    entropy = -(probabilities * np.log(probabilities)).sum()
    assert unigram_losses(counts, tokens).mean() == pytest.approx(entropy, abs=1e-3)


def test_a_token_that_was_never_seen_has_a_finite_loss():
    assert np.isfinite(unigram_losses(np.array([5, 0]), np.array([1]))).all()


METRICS = {"loss": 2.0, "perplexity": 7.4, "bitsPerByte": 1.0, "unigramPerplexity": 20.0, "unigramRatio": 2.7}


def _stage(**require: str) -> Evaluate:
    return Evaluate.model_validate({"from": {"model": "m", "shards": "s"}, "require": require})


def test_what_is_met_passes():
    check_requirements(_stage(perplexity="<8", unigramRatio=">=2.7"), METRICS)


def test_what_is_missed_is_named_with_its_value_and_bound():
    with pytest.raises(UserError) as caught:
        check_requirements(_stage(perplexity="<7", unigramRatio=">=3", loss="<3"), METRICS)
    assert str(caught.value).startswith(
        "evaluate.require.perplexity: 7.4 is not <7; evaluate.require.unigramRatio: 2.7 is not >=3: train longer"
    )
