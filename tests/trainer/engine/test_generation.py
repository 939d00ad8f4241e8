"""Generation: the tokens of whole forward passes and of transformers, under every layout and in any company."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.engine.gangs import PP2, TP1, TP2, gang
from trainer.engine.test_model import SHAPE, VOCAB, built, start_weights, transformers_llama

PROMPTS = [[1, 2, 3], [7, 30, 12, 9, 25, 99, 100, 3], [249], [5, 5]]
NEW = 12
LENGTH = 32
"""Tokens of a pack that holds any prompt and its completion."""


def prompts(*which: int) -> list[Any]:
    from headrace_trainer.engine.generation import Prompt

    return [Prompt(id=f"prompt {i}", tokens=PROMPTS[i]) for i in which or range(len(PROMPTS))]


def all_ways(rank: int, world: int, layout: dict[str, int]) -> dict[str, Any]:
    """Completions of several kinds under a layout."""
    from headrace_trainer.engine.forward import forward_passes
    from headrace_trainer.engine.generation import Prompt, generate
    from headrace_trainer.engine.logprobs import log_probs
    from headrace_trainer.engine.optimizer import wrap_model
    from headrace_trainer.engine.packed import collate
    from headrace_trainer.engine.sampling import Sampling
    from headrace_trainer.formats.packs import Document, Pack

    with built(rank, layout, SHAPE) as (ranks, model):

        def run(sampling: Sampling, *which: int) -> Any:
            return generate(model, prompts(*which), sampling, gang=ranks)

        def tokens(sampling: Sampling, *which: int) -> list[list[int]]:
            return [c.tokens for c in run(sampling, *which)]

        def pack(prompt: list[int], completion: list[int]) -> Any:
            ids = np.array(prompt + completion)
            document = Document(tokens=ids, mask=np.arange(len(ids)) > 0)
            return collate(Pack(documents=(document,)), length=LENGTH, device=ranks.device)

        def recomputed(completions: Any, *, temperature: float) -> float:
            """The largest difference to log-probabilities of whole passes."""
            batches = [pack(p, c.tokens) for p, c in zip(PROMPTS, completions, strict=True)]
            whole = log_probs(model, batches, temperature=temperature).tolist()
            return max(
                abs(a - b)
                for prompt, c, row in zip(PROMPTS, completions, whole, strict=True)
                for a, b in zip(c.log_probs, row[len(prompt) - 1 :], strict=False)
            )

        model.train()
        attentions = [layer.self_attention.core_attention for layer in model.decoder.layers]
        marks = marks_of(model)
        greedy, sampled = Sampling(max_new_tokens=NEW, temperature=0.0), Sampling(max_new_tokens=NEW, temperature=1.3)
        first, second = run(greedy), run(sampled)
        stop = frozenset({first[0].tokens[4], first[1].tokens[9]})
        found = {
            "greedy": [c.tokens for c in first],
            "greedy error": recomputed(first, temperature=1.0),
            "sampled": [c.tokens for c in second],
            "sampled error": recomputed(second, temperature=1.3),
            "stop": sorted(stop),
            "stopped": [(c.tokens, len(c.log_probs), c.stopped) for c in run(replace(greedy, stop_tokens=stop))],
            "as before": (model.training, marks_of(model) == marks),
        }
        if world == 1:  # where a token takes no collective
            narrow, other = replace(sampled, top_k=20, top_p=0.5), replace(sampled, seed=1)
            found |= {
                "again": [c.tokens for c in generate(wrap_model(model), prompts(), sampled, gang=ranks)],
                "alone": [tokens(sampled, i)[0] for i in range(len(PROMPTS))],
                "turned round": tokens(sampled, 3, 1, 0)[::-1],
                "other seed": tokens(other),
                "narrow": tokens(narrow),
                "top 1": tokens(replace(sampled, top_k=1)),
                "none": [tokens(replace(greedy, max_new_tokens=0)), generate(model, [], greedy, gang=ranks)],
                "empty": refusal(lambda: generate(model, [Prompt(id="x", tokens=[])], greedy, gang=ranks)),
                "whole passes": [by_whole_passes(model, prompt) for prompt in PROMPTS],
            }
            for layer in model.decoder.layers:
                layer.self_attention.core_attention = Deaf()
            found["deaf"] = tokens(greedy)
            found["deaf again"] = {type(layer.self_attention.core_attention).__name__ for layer in model.decoder.layers}
            for layer, core in zip(model.decoder.layers, attentions, strict=True):
                layer.self_attention.core_attention = core
        # It trains on: with sequence parallelism again, as before.
        batch = pack(PROMPTS[1], found["greedy"][1])
        nll = forward_passes(
            model, [batch], lambda m, b: (b.run(m, labels=b.labels_1T), lambda o: o[0]), shape=(LENGTH,)
        )
        return {**found, "losses": nll[0].tolist()}


def in_bf16(rank: int, world: int) -> list[tuple[list[int], bool]]:
    """Sampled tokens of a bf16 model of two stages, and whether they were about as likely as all others."""
    from headrace_api.parallelism import Layout
    from headrace_api.stages.training import Precision
    from headrace_trainer.engine.generation import generate
    from headrace_trainer.engine.model.build import build_model
    from headrace_trainer.engine.model.start import fill_start_weights
    from headrace_trainer.engine.parallel import join_gang
    from headrace_trainer.engine.sampling import Sampling

    with join_gang(Layout(**PP2), rank=rank) as ranks:
        model = build_model(SHAPE, gang=ranks, vocab_size=VOCAB, sequence_length=LENGTH, precision=Precision.BF16)
        fill_start_weights(model, SHAPE, seed=7)
        made = generate(model, prompts(), Sampling(max_new_tokens=NEW), gang=ranks)
    # Start weights know next to nothing: every token has about the same probability.
    return [(c.tokens, all(abs(p + np.log(VOCAB)) < 1 for p in c.log_probs)) for c in made]


class Deaf(torch.nn.Module):
    """Attention of another maker, which would not do here."""


def refusal(act: Any) -> str:
    with pytest.raises(ValueError) as said:
        act()
    return str(said.value)


def marks_of(model: Any) -> list[Any]:
    """What generation changes while it lasts."""
    holders = [model.config, *model.modules()]
    return [(getattr(holder, "sequence_parallel", None), "forward" in vars(holder)) for holder in holders]


def by_whole_passes(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(NEW):
            tokens = torch.tensor([ids])
            ids.append(int(model(tokens, torch.zeros_like(tokens), None)[0, -1, :VOCAB].argmax()))
    return ids[len(prompt) :]


def by_transformers(weights: dict[str, Any]) -> list[list[int]]:
    llama = transformers_llama(weights, SHAPE)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    made = llama.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return made[:, longest:].tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def one() -> Any:
    """What one rank gives."""
    (ended,) = gang(all_ways, 1, TP1)
    assert not ended.error, ended
    return ended.value


def test_greedy_tokens_are_those_of_whole_passes_and_of_transformers(tmp_path: Path, one: dict[str, Any]) -> None:
    assert one["greedy"] == one["whole passes"]
    assert one["greedy"] == by_transformers(start_weights(tmp_path, TP1, SHAPE))
    assert one["top 1"] == one["greedy"]


def test_attention_that_takes_no_mask_is_replaced_as_long_as_tokens_are_drawn(one: dict[str, Any]) -> None:
    assert one["deaf"] == one["greedy"]
    assert one["deaf again"] == {"Deaf"}


def test_log_probs_are_those_that_a_whole_pass_gives(one: dict[str, Any]) -> None:
    assert one["greedy error"] < 1e-5 and one["sampled error"] < 1e-5


def test_what_a_sequence_draws_depends_on_neither_its_company_nor_the_time(one: dict[str, Any]) -> None:
    assert one["again"] == one["sampled"] == one["alone"]
    assert one["turned round"] == [one["sampled"][i] for i in (0, 1, 3)]
    assert len({str(one[name]) for name in ("sampled", "other seed", "narrow", "greedy")}) == 4


def test_a_sequence_ends_with_a_stop_token_or_when_it_is_long_enough(one: dict[str, Any]) -> None:
    expected = []
    for tokens in one["greedy"]:
        end = next((i + 1 for i, token in enumerate(tokens) if token in one["stop"]), NEW)
        expected.append((tokens[:end], end, tokens[end - 1] in one["stop"]))
    assert one["stopped"] == expected
    assert len({length for _, length, _ in expected}) >= 2
    assert one["none"] == [[[], [], [], []], []]
    assert one["empty"] == "prompt 'x': it has no tokens: begin it with the tokenizer's first token"


def test_every_layout_gives_the_same_tokens_and_trains_on_as_before(one: dict[str, Any]) -> None:
    for layout in (TP2, PP2):
        ended = gang(all_ways, 2, layout)
        assert not any(e.error for e in ended), ended
        for e in ended:
            for name in ("greedy", "sampled", "stopped"):
                assert e.value[name] == one[name], name
            assert e.value["greedy error"] < 1e-5 and e.value["sampled error"] < 1e-5
            assert e.value["losses"] == pytest.approx(one["losses"], abs=1e-5, rel=0)
            assert e.value["as before"] == one["as before"] == (True, True)


def test_a_bf16_model_generates() -> None:
    first, second = gang(in_bf16, 2)
    assert not first.error and first.value == second.value, (first, second)
    assert [(len(tokens), is_likely) for tokens, is_likely in first.value] == [(NEW, True)] * len(PROMPTS)
