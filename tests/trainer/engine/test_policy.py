"""What rewarded answers teach: advantages by hand, and losses that do not depend on how a batch is cut."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

VOCAB = 11


def judged(reward: float, length: int, **fields: Any) -> Any:
    from headrace_trainer.engine.advantages import Judged

    zeros = np.zeros(length, np.float32)
    known = {"stopped": True, "log_probs": zeros, "reference": zeros, "values": zeros} | fields
    return Judged(reward=reward, **known)


def worth(credit: str, **fields: Any) -> Any:
    from headrace_trainer.engine.advantages import Credit, Worth
    from headrace_trainer.engine.losses import KlEstimator

    known = {"group_size": 2, "estimator": KlEstimator.K1} | fields
    return Worth(credit=Credit[credit], **known)


def test_an_answer_is_held_against_its_group() -> None:
    from headrace_trainer.engine.advantages import credit

    answers = [judged(1, 2), judged(0, 3), judged(5, 1), judged(5, 1)]
    unscaled = credit(answers, worth("GROUP_UNSCALED"), kl_coefficient=0.0)
    assert [c.advantages.tolist() for c in unscaled] == [[0.5] * 2, [-0.5] * 3, [0], [0]]
    others = credit(answers, worth("OTHERS"), kl_coefficient=0.0)
    assert [c.advantages.tolist() for c in others] == [[1] * 2, [-1] * 3, [0], [0]]
    scaled = credit(answers, worth("GROUP"), kl_coefficient=0.0)
    assert [c.advantages[0] for c in scaled] == pytest.approx([0.7070, -0.7070, 0, 0], abs=1e-4)


def test_the_divergence_is_a_part_of_the_reward() -> None:
    from headrace_trainer.engine.advantages import credit

    far = judged(1, 2, log_probs=np.array([0.5, 1.5], np.float32))
    found = credit([far, judged(0, 1)], worth("OTHERS"), kl_coefficient=0.25)
    assert [c.advantages[0] for c in found] == pytest.approx([0.5, -0.5])


def test_a_value_is_learned_from_what_came() -> None:
    """r = [0, 0, 1], V = 0.5, lambda 0.95: advantages of 0.45125, 0.475 and 0.5, before they are whitened."""
    from headrace_trainer.engine.advantages import credit

    half = np.full(3, 0.5, np.float32)
    answers = [judged(1, 3, values=half), judged(1, 3, values=half, stopped=False)]
    first, second = credit(answers, worth("VALUE", missing_eos_penalty=1.0), kl_coefficient=0.0)
    assert first.returns.tolist() == pytest.approx([0.95125, 0.975, 1.0])
    # Without an end, what it scores is the penalty less.
    assert second.returns.tolist() == pytest.approx([0.5 - 0.45125, 0.5 - 0.475, 0.0], abs=1e-6)
    together = np.concatenate([first.advantages, second.advantages])
    assert together.mean() == pytest.approx(0, abs=1e-6)
    assert together.std(ddof=1) == pytest.approx(1, abs=1e-4)


def test_what_failed_teaches_nothing() -> None:
    from headrace_trainer.engine.advantages import neutral_for_failed

    found = neutral_for_failed(np.array([1.0, np.nan, 3.0, np.inf, np.nan, -np.inf]), group_size=3)
    assert found.tolist() == [1, 2, 3, 0, 0, 0]


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (0.0, 0.98)],
    ids=["on target", "10% above", "far", "none"],
)
def test_the_coefficient_adapts_to_the_target(kl: float, factor: float) -> None:
    from headrace_trainer.engine.advantages import adapted

    assert adapted(0.2, kl=kl, target=6.0, answers=10, horizon=100) == pytest.approx(0.2 * factor)


class Table(torch.nn.Module):
    """Logits that depend on the token alone."""

    real_vocab_size = VOCAB

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.linspace(-1, 1, VOCAB * VOCAB).reshape(VOCAB, VOCAB).sin())

    def forward(self, tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.logits[tokens]


def experiences(*, moved: float = 0.0) -> list[Any]:
    """Answers of several lengths, and log-probabilities of a policy that has moved since."""
    from headrace_trainer.engine.policy import Experience
    from headrace_trainer.formats.packs import Document

    table, draw = Table().logits.detach().log_softmax(-1), np.random.default_rng(3)
    out = []
    for length, advantage in ((1, 0.5), (4, -1.0), (2, 2.0), (3, -0.25)):
        tokens = draw.integers(0, VOCAB, 2 + length)
        exact = np.array([float(table[a, b]) for a, b in itertools.pairwise(tokens[1:])], np.float32)
        out.append(
            Experience(
                document=Document(tokens=tokens, mask=np.arange(2 + length) >= 2),
                log_probs=exact - np.float32(moved),
                advantages=np.full(length, advantage, np.float32),
                reference=exact + np.float32(0.1),
                kl_weight=0.5,
            )
        )
    return out


def objective_of(loss: str) -> Any:
    from headrace_trainer.engine.losses import Aggregation, KlEstimator
    from headrace_trainer.engine.policy import PolicyGradient, Ratio, Rule

    ratio, aggregation = {
        "grpo": (Ratio.TOKEN, Aggregation.SEQUENCE),
        "dapo": (Ratio.TOKEN, Aggregation.TOKEN),
        "dr_grpo": (Ratio.TOKEN, Aggregation.CONSTANT),
        "gspo": (Ratio.MEAN, Aggregation.SEQUENCE),
        "rloo": (Ratio.SUM, Aggregation.SEQUENCE),
    }[loss]
    rule = Rule(
        ratio=ratio,
        aggregation=aggregation,
        clip_low=0.2,
        clip_high=0.2,
        estimator=KlEstimator.K3,
        temperature=1.0,
        longest=4,
    )
    found = PolicyGradient(rule, fixed=False)
    found.shape(8, 16)
    return found


def run(objective: Any, rows: list[list[Any]]) -> tuple[float, dict[str, float], torch.Tensor]:
    """Mean loss, mean figures and gradient over rows that are passed one after the other."""
    model, totals = Table(), None
    for row in rows:
        batch = objective.collate(row, [1.0] * len(row), torch.device("cpu"))
        output, loss_of = objective.forward(model, batch)
        loss = loss_of(output)
        loss.total.backward()
        found = torch.stack([x.detach().double() for x in (loss.total, loss.count, *loss.metrics)])
        totals = found if totals is None else totals + found
    assert totals is not None
    mean, figures = totals[0] / totals[1], (totals[2:] / totals[1]).tolist()
    assert model.logits.grad is not None
    return float(mean), dict(zip(objective.METRICS, figures, strict=True)), model.logits.grad / totals[1]


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallelism of one, without process groups."""
    from headrace_trainer.engine import logprobs

    def entropy(logits: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Categorical(logits=logits).entropy()

    def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]

    monkeypatch.setattr(logprobs, "vocab_parallel_entropy", entropy)
    monkeypatch.setattr(logprobs.tensor_parallel, "vocab_parallel_cross_entropy", cross_entropy)
    monkeypatch.setattr(logprobs, "hide_padding", lambda logits, size: logits)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "rloo"])
def test_losses_do_not_depend_on_how_a_batch_is_cut(one_rank: None, loss: str) -> None:
    some = experiences(moved=0.15)
    whole, figures, gradient = run(objective_of(loss), [some])
    cut, figures_cut, gradient_cut = run(objective_of(loss), [some[:1], some[1:]])
    assert cut == pytest.approx(whole, abs=1e-6)
    assert figures_cut == pytest.approx(figures, abs=1e-6)
    assert torch.allclose(gradient_cut, gradient, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # Before the policy moves, ratios are 1, so the loss is minus the mean advantage, by answer or by token.
        ("grpo", -(0.5 - 1.0 + 2.0 - 0.25) / 4),
        ("gspo", -(0.5 - 1.0 + 2.0 - 0.25) / 4),
        ("rloo", -(0.5 - 1.0 + 2.0 - 0.25) / 4),
        ("dapo", -(0.5 - 4.0 + 4.0 - 0.75) / 10),
        ("dr_grpo", -(0.5 - 4.0 + 4.0 - 0.75) / 4 / 4),
    ],
)
def test_the_policy_that_drew_the_answers_has_the_mean_advantage(one_rank: None, loss: str, expected: float) -> None:
    kl = np.expm1(0.1) - 0.1  # k3 of a reference that is 0.1 above
    found, figures, _ = run(objective_of(loss), [experiences()])
    weight = 10 / 4 / 4 if loss == "dr_grpo" else 1  # tokens over answers and the longest
    assert found == pytest.approx(expected + 0.5 * kl * weight, abs=1e-6)
    assert figures["kl"] == pytest.approx(kl, abs=1e-6)
    assert figures["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert figures["policy/clipfrac_avg"] == 0


def test_ratios_of_whole_answers_are_clipped_where_those_of_tokens_are_not(one_rank: None) -> None:
    """Each token's probability rose by a factor of e^0.15 = 1.16, below 1.2; an answer's by its power."""
    some = experiences(moved=0.15)
    assert run(objective_of("grpo"), [some])[1]["policy/clipfrac_avg"] == 0
    assert run(objective_of("gspo"), [some])[1]["policy/clipfrac_avg"] == 0
    # Of the answers with a positive advantage, that of two tokens is at e^0.3.
    assert run(objective_of("rloo"), [some])[1]["policy/clipfrac_avg"] == pytest.approx(1 / 4)


def test_a_row_that_only_fills_a_round_counts_for_nothing(one_rank: None) -> None:
    objective, some = objective_of("grpo"), experiences()
    batch = objective.collate(some[:2], [0.0, 0.0], torch.device("cpu"))
    output, loss_of = objective.forward(Table(), batch)
    found = loss_of(output)
    assert (found.total.item(), found.count.item()) == (0, 0)
    assert all(m.item() == 0 for m in found.metrics[1:])
