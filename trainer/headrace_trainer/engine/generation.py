"""Sampling from the model that trains, on the mesh that it trains on, with a cache of keys and values.

In: prompts of any lengths. Out: completions with the log-probability of each token, the same on every rank of the
replica. Prompts are padded on the left, so that all of a batch are read in one pass and continue at the same position;
padding is hidden from attention, and rotary positions are relative. Each sequence draws from a generator of its own, so
neither the rest of its batch nor the layout changes what it draws.

Shapes: B sequences that are not finished, S positions of one pass, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from headrace_trainer import board
from headrace_trainer.engine.device import send
from headrace_trainer.engine.device.megatron import (
    MegatronModule,
    StaticInferenceContext,
    get_attr_wrapped_model,
    parallel_state,
)
from headrace_trainer.engine.model.inference import ready_to_generate
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.sampling import Sampling, choose, uniform_draws


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a sequence begins with."""

    id: str
    """Names the sequence's generator, together with the seed: two of one id and one prompt give one completion."""
    tokens: Sequence[int]
    """At least one."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a prompt was continued with."""

    tokens: list[int]
    """A stop token included."""
    log_probs: list[float]
    """Of each token under the model at the temperature, in nats, before top-k and top-p; at temperature 0, those at 1."""
    stopped: bool
    """Whether it ended with a stop token, and not because it was long enough."""


@torch.no_grad()
def generate(model: MegatronModule, prompts: Sequence[Prompt], sampling: Sampling, *, gang: Gang) -> list[Completion]:
    """Continue all prompts together. Every rank of the replica calls, with the same prompts.

    Args:
        model: a language model, wrapped or not; it may be in the middle of its training, its weights gathered.
        prompts: one batch; its cache must fit into memory.
        sampling: how.
        gang: this rank's place.

    Returns:
        A completion for each prompt, in order.

    Raises:
        ValueError: a prompt without tokens.
    """
    if empty := [prompt.id for prompt in prompts if len(prompt.tokens) == 0]:
        raise ValueError(f"prompt {empty[0]!r}: it has no tokens: begin it with the tokenizer's first token")
    with ready_to_generate(model):
        batch = _Batch(model, prompts, sampling, gang)
        while batch.rows:
            batch.advance()
            board.beat()
    return [
        Completion(tokens=t, log_probs=p, stopped=bool(t) and t[-1] in sampling.stop_tokens)
        for t, p in zip(batch.tokens, batch.log_probs, strict=True)
    ]


class _Batch:
    """Sequences that grow by one token at a time.

    Attributes:
        tokens: of each completion, so far.
        log_probs: theirs.
        rows: which prompts the rows of the batch belong to.
    """

    def __init__(self, model: MegatronModule, prompts: Sequence[Prompt], sampling: Sampling, gang: Gang) -> None:
        self._stage, self._sampling, self._gang = _Stage(model, gang), sampling, gang
        self._draws = [uniform_draws(sampling, prompt.id) for prompt in prompts] if gang.is_last_stage else []
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.log_probs: list[list[float]] = [[] for _ in prompts]
        self.rows = list(range(len(prompts))) if sampling.max_new_tokens > 0 else []
        longest = max((len(prompt.tokens) for prompt in prompts), default=0)
        self._context = StaticInferenceContext(len(prompts), longest + sampling.max_new_tokens)
        padding = [longest - len(prompt.tokens) for prompt in prompts]
        rows = [[0] * pad + list(prompt.tokens) for pad, prompt in zip(padding, prompts, strict=True)]
        self._next_BS = self._tensor(rows)
        self._padding_B = self._tensor(padding) if any(padding) else None

    def advance(self) -> None:
        """Add a token to every row, and let go of the rows that it ends."""
        logits_BV = self._stage.run(self._next_BS, hidden=self._hidden(), context=self._context)
        self._context.sequence_len_offset += self._next_BS.size(1)
        chosen = self._agreed(None if logits_BV is None else self._choose(logits_BV))
        for row, token, log_prob in zip(self.rows, *chosen, strict=True):
            self.tokens[row].append(int(token))
            self.log_probs[row].append(log_prob)
        self._keep([i for i, row in enumerate(self.rows) if not self._is_finished(row)])

    def _is_finished(self, row: int) -> bool:
        tokens = self.tokens[row]
        return tokens[-1] in self._sampling.stop_tokens or len(tokens) == self._sampling.max_new_tokens

    def _choose(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The next token of each row, and its log-probability, float64 [2, B]."""
        step = len(self.tokens[self.rows[0]])
        draws_B = torch.tensor([self._draws[row][step] for row in self.rows], dtype=torch.float64)
        tokens_B, log_probs_B = choose(logits_BV, self._sampling, draws_B)
        return torch.stack((tokens_B.double(), log_probs_B.double()))

    def _agreed(self, chosen: torch.Tensor | None) -> list[list[float]]:
        """What the first tensor rank of the last stage chose, on every rank of the replica."""
        if chosen is None:
            chosen = torch.empty(2, len(self.rows), dtype=torch.float64)
        chosen = chosen.to(self._gang.device)
        group = parallel_state.get_model_parallel_group()
        if group.size() > 1:
            last_stage = dist.get_process_group_ranks(group)[-self._gang.layout.tensor :]
            dist.broadcast(chosen, src=last_stage[0], group=group)
        found: list[list[float]] = chosen.tolist()
        return found

    def _keep(self, kept: list[int]) -> None:
        """Go on with some of the rows: the others cost nothing from here on."""
        newest = [self.tokens[self.rows[i]][-1] for i in kept]
        self._next_BS = self._tensor(newest)[:, None]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        index_B, cache = self._tensor(kept), self._context.key_value_memory_dict
        for layer, memories in cache.items():
            cache[layer] = tuple(memory_BGSD[index_B] for memory_BGSD in memories)
        if self._padding_B is not None:
            self._padding_B = self._padding_B[index_B]

    def _hidden(self) -> torch.Tensor | None:
        """What each query must not see, [B, 1, queries, keys]; None where nothing but what comes later."""
        if self._padding_B is None:
            return None
        first, num_queries = self._context.sequence_len_offset, self._next_BS.size(1)
        queries_S1 = torch.arange(first, first + num_queries, device=self._gang.device)[:, None]
        keys_S = torch.arange(first + num_queries, device=self._gang.device)
        hidden_BSS = (keys_S > queries_S1) | (keys_S < self._padding_B[:, None, None])
        # Padding sees itself: a softmax over nothing is NaN.
        return (hidden_BSS & (keys_S != queries_S1))[:, None]

    def _tensor(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return send(torch.tensor(values, dtype=torch.int64), self._gang.device)


class _Stage:
    """This rank's pipeline stage, which gets activations from the stage before it and hands its own on."""

    def __init__(self, model: MegatronModule, gang: Gang) -> None:
        self._model, self._gang = model, gang
        self._set_input = get_attr_wrapped_model(model, "set_input_tensor")
        self._vocab_size = get_attr_wrapped_model(model, "real_vocab_size")

    def run(
        self, tokens_BS: torch.Tensor, *, hidden: torch.Tensor | None, context: StaticInferenceContext
    ) -> torch.Tensor | None:
        """Logits after the last position, [B, V], on the last stage; None on the others."""
        if not self._gang.is_first_stage:
            config, (num_rows, length) = self._model.config, tokens_BS.shape
            activations_SBH = torch.empty(
                length, num_rows, config.hidden_size, dtype=config.pipeline_dtype, device=self._gang.device
            )
            dist.recv(activations_SBH, src=parallel_state.get_pipeline_model_parallel_prev_rank())
            self._set_input([activations_SBH])
        output = self._model(
            tokens_BS, torch.zeros_like(tokens_BS), hidden, inference_context=context, runtime_gather_output=True
        )
        if self._gang.is_last_stage:
            return output[:, -1, : self._vocab_size]  # type: ignore[no-any-return]
        dist.send(output.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())
        return None
