"""Log-probabilities and entropies of packs are those of the whole logits, and so are their gradients."""

from collections.abc import Callable
from typing import Any

import pytest

from trainer.engine.gangs import LENGTH, PP2, TP1, TP2, gang
from trainer.engine.test_model import SHAPE, VOCAB, built
from trainer.engine.test_packed import gradient_step, packs, stepper_of

TEMPERATURE = 0.7


class Mixed:
    """Log-probabilities and entropies, each of which has a gradient of its own."""

    METRICS = ()

    def forward(self, model: Any, batch: Any) -> tuple[Any, Callable[[Any], Any]]:
        import torch

        from headrace_trainer.engine.logprobs import score
        from headrace_trainer.engine.objective import Loss

        output, scores = score(model, batch, temperature=TEMPERATURE, entropy=True)

        def loss(output: Any) -> Loss:
            found = scores(output)
            total = ((0.5 * found.entropy_1T - found.log_probs_1T) * batch.mask_1T).sum()
            return Loss(total=total, count=batch.mask_1T.sum().to(torch.int32))

        return output, loss


def under_a_layout(rank: int, world: int, layout: dict[str, int]) -> dict[str, Any]:
    from headrace_trainer.engine.forward import forward_passes
    from headrace_trainer.engine.logprobs import log_probs, score
    from headrace_trainer.engine.packed import collate

    def entropies(model: Any, batch: Any) -> tuple[Any, Callable[[Any], Any]]:
        output, scores = score(model, batch, entropy=True)
        return output, lambda output: scores(output).entropy_1T[0]

    with built(rank, layout, SHAPE) as (ranks, model):
        batches = [collate(pack, length=LENGTH, device=ranks.device) for pack in packs()]
        return {
            "log_probs": log_probs(model, batches).tolist(),
            "tempered": log_probs(model, batches, temperature=TEMPERATURE).tolist(),
            "entropies": forward_passes(model, batches, entropies, shape=(LENGTH,)).tolist(),
            **gradient_step(stepper_of(ranks, model, Mixed()), batches),
        }


def from_whole_logits(rank: int, world: int) -> dict[str, Any]:
    """The same from the logits of the real vocabulary, which one rank has whole; and the largest error of a gradient."""
    import torch

    from headrace_trainer.engine.logprobs import score
    from headrace_trainer.engine.losses import token_entropy, token_log_probs
    from headrace_trainer.engine.packed import collate

    with built(rank, TP1, SHAPE) as (ranks, model):
        batches = [collate(pack, length=LENGTH, device=ranks.device) for pack in packs()]

        def logits(batch: Any) -> Any:
            return batch.run(model)[..., :VOCAB]

        def gradients(loss: Any) -> list[Any]:
            model.zero_grad()
            loss.backward()
            return [p.grad.clone() for p in model.parameters()]

        batch, tempered = batches[0], logits(batches[0]) / TEMPERATURE
        by_hand = 0.5 * token_entropy(tempered) - token_log_probs(tempered, batch.labels_1T)
        wanted = gradients((by_hand * batch.mask_1T).sum())
        output, scores = score(model, batch, temperature=TEMPERATURE, entropy=True)
        found = scores(output)
        got = gradients(((0.5 * found.entropy_1T - found.log_probs_1T) * batch.mask_1T).sum())
        with torch.no_grad():
            return {
                "log_probs": [token_log_probs(logits(b), b.labels_1T)[0].tolist() for b in batches],
                "tempered": [token_log_probs(logits(b) / TEMPERATURE, b.labels_1T)[0].tolist() for b in batches],
                "entropies": [token_entropy(logits(b))[0].tolist() for b in batches],
                "gradient error": max((a - b).abs().max().item() for a, b in zip(wanted, got, strict=True)),
                "largest gradient": max(g.abs().max().item() for g in wanted),
            }


def test_log_probs_and_entropies_are_those_of_whole_logits_under_every_layout() -> None:
    (whole,) = gang(from_whole_logits, 1)
    assert not whole.error, whole
    assert whole.value["gradient error"] < 1e-5 < 1e-2 < whole.value["largest gradient"]
    (one,) = gang(under_a_layout, 1, TP1)
    for layout in (TP1, TP2, PP2):
        ended = [one] if layout == TP1 else gang(under_a_layout, 2, layout)
        assert not any(e.error for e in ended), ended
        for e in ended:
            for name in ("log_probs", "tempered", "entropies"):
                for found, wanted in zip(e.value[name], whole.value[name], strict=True):
                    assert found == pytest.approx(wanted, abs=2e-6, rel=0), name
            assert e.value["sums"] == pytest.approx(one.value["sums"], rel=1e-6)
            assert e.value["norm"] == pytest.approx(one.value["norm"], rel=1e-5)
