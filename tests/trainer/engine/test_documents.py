"""Pretraining with a document mask: each document has the losses that it has alone, under every layout and after a kill."""

import itertools
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace_trainer.engine.documents import document_starts
from trainer.engine.gangs import BATCH, DP2, LENGTH, PP2, TP1, TP2, TP2_PP2, Run, gang, losses, train
from trainer.engine.test_model import SHAPE, VOCAB, built

BEGINS = 0
MASKED = {"documentMask": True}


def run_in(folder: Path, **fields: Any) -> Run:
    """Samples of 32 tokens with about two documents each."""
    return Run(folder=folder, **({"steps": 12, "vocab_size": 16, "overrides": MASKED} | fields))


def test_documents_begin_where_samples_do_and_at_the_token_between_them() -> None:
    inputs = np.array([[5, 0, 6, 7], [0, 0, 8, 9], [1, 2, 3, 0]])
    assert document_starts(inputs, begins=0).tolist() == [0, 1, 4, 5, 8, 11]


def packed_and_alone(rank: int, world: int) -> dict[str, Any]:
    """Losses of three samples in one row, those of their documents one by one, and those without a mask."""
    import torch

    from headrace_trainer.engine.documents import NextTokenInDocument
    from headrace_trainer.engine.objective import NextToken

    draw = np.random.default_rng(3)
    samples = [draw.integers(1, VOCAB, LENGTH + 1) for _ in range(3)]
    for sample, at in zip(samples, ((7, 20), (0, 1), (LENGTH,)), strict=True):
        sample[list(at)] = BEGINS
    with built(rank, TP1, SHAPE) as (ranks, model):
        objective = NextTokenInDocument(begins=BEGINS)
        batch = objective.collate(samples, [1.0, 1.0, 0.0], ranks.device)
        output, loss_of = objective.forward(model, batch)
        loss = loss_of(output)
        alone, edges = [], batch.cu_seqlens.tolist()
        for begin, end in itertools.pairwise(edges):
            tokens, labels = batch.tokens_1T[:, begin:end], batch.labels_1T[:, begin:end]
            alone.append(model(tokens, torch.zeros_like(tokens), None, labels=labels)[0])
        plain = NextToken()
        across, _ = plain.forward(model, plain.collate(samples, [1.0] * 3, ranks.device))
        counted = torch.cat(alone)[: 2 * LENGTH]
        return {
            "difference": (output[0] - torch.cat(alone)).abs().max().item(),
            "across": (output[0] - across.flatten()).abs().max().item(),
            "sum": (loss.total - counted.sum()).item(),
            "count": int(loss.count),
            "documents": batch.num_documents,
        }


def test_a_documents_losses_are_those_that_it_has_alone() -> None:
    (ended,) = gang(packed_and_alone, 1)
    assert not ended.error, ended
    found = ended.value
    assert found["documents"] == 3 + 2 + 1
    assert found["difference"] < 1e-5
    assert found["across"] > 1e-3, "without the mask, a document sees those before it"
    assert found["count"] == 2 * LENGTH, "the same labels count as without the mask"
    assert found["sum"] == pytest.approx(0, abs=1e-3)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(run_in(tmp_path_factory.mktemp("one")), TP1)


@pytest.mark.parametrize("layout", [TP2, PP2, DP2, TP2_PP2], ids=["TP2", "PP2", "DP2", "TP2xPP2"])
def test_losses_do_not_depend_on_the_layout(tmp_path: Path, one_rank: list[float], layout: dict[str, int]) -> None:
    assert losses(run_in(tmp_path), layout) == pytest.approx(one_rank, abs=1e-5, rel=0)


def test_nor_on_the_size_of_a_micro_batch(tmp_path: Path, one_rank: list[float]) -> None:
    found = losses(run_in(tmp_path, overrides=MASKED | {"microBatchSize": BATCH}), TP1)
    assert found == pytest.approx(one_rank, abs=1e-5, rel=0)


def test_the_default_sees_across_documents_as_before(tmp_path: Path, one_rank: list[float]) -> None:
    unset = losses(run_in(tmp_path / "unset", overrides={}), TP1)
    false = losses(run_in(tmp_path / "false", overrides={"documentMask": False}), TP1)
    assert unset == false
    assert unset[0] != pytest.approx(one_rank[0], abs=1e-5)


@pytest.mark.parametrize("layout", [TP2, PP2, DP2], ids=["TP2", "PP2", "DP2"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, layout: dict[str, int]) -> None:
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    whole = train(run_in(tmp_path / "whole", every=3), layout)[0].value.history
    seed = random.randrange(10**6)
    print(f"HEADRACE_TEST_SEED={seed}")
    run = run_in(tmp_path / "killed", every=3, die_at=random.Random(seed).randrange(5, 11))
    assert train(run, layout)[-1].exit_code == -signal.SIGKILL
    again = train(replace(run, attempt=2, die_at=None), layout)[0].value
    assert again.first_step > 0
    assert [r["loss_hex"] for r in again.history] == [r["loss_hex"] for r in whole]
