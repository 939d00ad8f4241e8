"""Packs: every document has the losses and gradients that it has alone, under every layout, and none sees another."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from headrace_trainer.formats.packs import Document, Pack
from trainer.engine.gangs import LENGTH, PP2, TP1, TP2, gang
from trainer.engine.test_model import SHAPE, VOCAB, built

LENGTHS = (5, 11, 9)
"""Tokens of the documents of a pack; 7 tokens of padding are left."""


def document(seed: int, length: int) -> Document:
    rng = np.random.default_rng(seed)
    tokens, mask = rng.integers(0, VOCAB, length), rng.random(length) < 0.7
    mask[:1] = False  # nothing comes before it
    return Document(tokens=tokens, mask=mask)


def packs() -> list[Pack]:
    """Two packs; the second is full."""
    first = Pack(documents=tuple(document(i, n) for i, n in enumerate(LENGTHS)))
    return [first, Pack(documents=(document(7, 20), document(8, LENGTH - 20)))]


def alone(pack: Pack) -> list[Pack]:
    return [Pack(documents=(d,)) for d in pack.documents]


# What ranks do --------------------------------------------------------------------------------------------------------


def nll(model: Any, batch: Any) -> tuple[Any, Callable[[Any], Any]]:
    return batch.run(model, labels=batch.labels_1T), lambda losses_1T: losses_1T[0]


def losses_and_gradients(rank: int, world: int, layout: dict[str, int]) -> dict[str, Any]:
    """Losses of packs, and the loss and norm of the gradient of a step over both."""
    from headrace_trainer.engine.forward import forward_passes
    from headrace_trainer.engine.packed import collate

    with built(rank, layout, SHAPE) as (ranks, model):
        batches = [collate(pack, length=LENGTH, device=ranks.device) for pack in packs()]
        found = forward_passes(model, batches, nll, shape=(LENGTH,))
        step = gradient_step(stepper_of(ranks, model, MaskedNll()), batches)
        return {"losses": found.tolist(), **step}


def stepper_of(ranks: Any, model: Any, objective: Any) -> Any:
    """What trains a model on packs."""
    from headrace_api.stages.training import Optimizer, Precision, Schedule
    from headrace_trainer.engine.optimizer import build_optimizer, wrap_model
    from headrace_trainer.engine.step import Stepper

    wrapped = wrap_model(model)
    return Stepper(
        gang=ranks,
        model=wrapped,
        optimizer=build_optimizer(wrapped, Optimizer(), schedule=Schedule(), precision=Precision.FP32),
        objective=objective,
        sequence_length=LENGTH,
        micro_batch_size=1,
        weight_decay=0.0,
    )


def gradient_step(stepper: Any, batches: list[Any]) -> dict[str, Any]:
    """The loss of a global batch of packs, its divisor, and the norm of its gradient."""
    from headrace_trainer.engine.batches import GlobalBatch

    sums = stepper.gradients(GlobalBatch(num_micro_batches=len(batches), micro_batches=iter(batches)))
    return {"sums": stepper.gang.sum(sums.tolist()[:2]), "norm": stepper.gradient_norm()}


class MaskedNll:
    """What fine-tuning minimizes."""

    METRICS = ()

    def forward(self, model: Any, batch: Any) -> tuple[Any, Callable[[Any], Any]]:
        import torch

        from headrace_trainer.engine.losses import supervised
        from headrace_trainer.engine.objective import Loss

        def loss(losses_1T: Any) -> Loss:
            total, count = supervised(-losses_1T, batch.mask_1T)
            return Loss(total=total, count=count.to(torch.int32))

        return batch.run(model, labels=batch.labels_1T), loss


def on_one_rank(rank: int, world: int) -> dict[str, Any]:
    """Documents packed and alone, with gradients of every weight; and a pack with one document changed."""
    import torch

    from headrace_trainer.engine.packed import collate

    with built(rank, TP1, SHAPE) as (ranks, model):

        def run(pack: Pack, *, length: int = LENGTH) -> tuple[Any, dict[str, Any]]:
            batch = collate(pack, length=length, device=ranks.device)
            losses_1T = batch.run(model, labels=batch.labels_1T)
            model.zero_grad()
            (losses_1T * batch.mask_1T).sum().backward()
            return losses_1T[0].detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

        pack = packs()[0]
        losses, gradients = run(pack)
        singles = [run(one) for one in alone(pack)]
        # No padding, and no pack either: the way that pretraining goes.
        plain = []
        for d in pack.documents:
            tokens = torch.from_numpy(d.tokens)[None]
            plain.append(model(tokens[:, :-1], torch.zeros_like(tokens[:, :-1]), None, labels=tokens[:, 1:])[0])
        begins = np.cumsum([0, *LENGTHS])
        changed = [
            run(Pack(documents=(*pack.documents[:i], document(99, n), *pack.documents[i + 1 :])))[0]
            for i, n in enumerate(LENGTHS)
        ]
        return {
            "alone": max(
                (losses[b : b + n - 1] - one[: n - 1]).abs().max().item()
                for b, n, (one, _) in zip(begins, LENGTHS, singles, strict=False)
            ),
            "plain": max(
                (losses[b : b + n - 1] - one).abs().max().item()
                for b, n, one in zip(begins, LENGTHS, plain, strict=False)
            ),
            "gradients": max(
                (gradients[name] - sum(g[name] for _, g in singles)).abs().max().item() for name in gradients
            ),
            "largest gradient": max(g.abs().max().item() for g in gradients.values()),
            "bits": [
                [torch.equal(other[b : b + n], losses[b : b + n]) for b, n in zip(begins, LENGTHS, strict=False)]
                for other in changed
            ],
        }


# What comes of it -----------------------------------------------------------------------------------------------------


def test_documents_of_a_pack_are_as_they_are_alone_and_none_sees_another() -> None:
    (ended,) = gang(on_one_rank, 1)
    assert not ended.error, ended
    found = ended.value
    assert found["alone"] < 1e-5 and found["plain"] < 1e-5, found
    assert found["gradients"] < 1e-5 < 1e-2 < found["largest gradient"], found
    # Only what was changed has other bits.
    assert found["bits"] == [[False, True, True], [True, False, True], [True, True, False]]


def test_losses_and_gradients_of_packs_are_the_same_under_every_layout() -> None:
    (one,) = gang(losses_and_gradients, 1, TP1)
    assert not one.error, one
    count = sum(int(d.mask[1:].sum()) for pack in packs() for d in pack.documents)
    assert one.value["sums"][1] == count
    for layout in (TP2, PP2):
        ended = gang(losses_and_gradients, 2, layout)
        assert not any(e.error for e in ended), ended
        for e in ended:  # the last stage's losses are known on all ranks
            for found, wanted in zip(e.value["losses"], one.value["losses"], strict=True):
                assert found == pytest.approx(wanted, abs=1e-5, rel=0)
            assert e.value["sums"] == pytest.approx(one.value["sums"], rel=1e-6)
            assert e.value["norm"] == pytest.approx(one.value["norm"], rel=1e-5)


def collated(rank: int, world: int) -> dict[str, Any]:
    """A small pack, collated; and what is said of packs that do not fit."""
    import torch

    from headrace_trainer.engine.packed import collate

    def refusal(*lengths: int) -> str:
        with pytest.raises(ValueError) as said:
            collate(Pack(documents=tuple(document(1, n) for n in lengths)), length=7, device=torch.device("cpu"))
        return str(said.value)

    first = Document(tokens=np.array([5, 6, 7]), mask=np.array([False, False, True]))
    second = Document(tokens=np.array([8, 9]), mask=np.array([False, True]))
    batch = collate(Pack(documents=(first, second)), length=7, device=torch.device("cpu"))
    values_1T = torch.tensor([[1.0, 2, 4, 8, 16, 32, 64]])
    return {
        "tokens": batch.tokens_1T.tolist(),
        "labels": batch.labels_1T.tolist(),
        "mask": batch.mask_1T.tolist(),
        "documents": batch.documents_T.tolist(),
        "begins": (batch.cu_seqlens.dtype, batch.cu_seqlens.tolist()),
        "sizes": (batch.num_documents, batch.longest),
        "sums": batch.sums(values_1T).tolist(),
        "lasts": batch.lasts(values_1T).tolist(),
        "too long": refusal(4, 4),
        "empty": refusal(0, 3),
    }


def test_labels_are_the_next_tokens_of_the_same_document() -> None:
    import torch

    (ended,) = gang(collated, 1)
    assert ended.value == {
        "tokens": [[5, 6, 7, 8, 9, 0, 0]],
        "labels": [[6, 7, 0, 9, 0, 0, 0]],
        "mask": [[0, 1, 0, 1, 0, 0, 0]],
        "documents": [0, 0, 0, 1, 1, 2, 2],
        "begins": (torch.int32, [0, 3, 5, 7]),
        "sizes": (2, 3),
        "sums": [7, 24],
        "lasts": [4, 16],
        "too long": "a pack of documents of [4, 4] tokens does not fit into 7 tokens: leave out empty ones, cut long ones",
        "empty": "a pack of documents of [0, 3] tokens does not fit into 7 tokens: leave out empty ones, cut long ones",
    }, ended
