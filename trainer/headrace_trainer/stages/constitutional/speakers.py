"""Who answers: a model on this mesh, or a server (``endpoint``). Both take the same questions.

In: ``Ask`` values. Out: replies as text, or the probability of the first of two replies; or why there is none, which
costs the one record that it is of.

Shapes: T tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import torch

from headrace_trainer import board
from headrace_trainer.engine.device.megatron import MegatronModule
from headrace_trainer.engine.generation import Prompt, generate
from headrace_trainer.engine.logprobs import log_probs
from headrace_trainer.engine.packed import collate
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.sampling import Sampling
from headrace_trainer.formats.chat import Encoded, Encoder
from headrace_trainer.formats.packs import Document, Pack
from headrace_trainer.formats.records import BadRecord, CompletionRecord, Place, PromptRecord
from headrace_trainer.stages.constitutional.asking import Ask, as_answer

_ROWS_AT_ONCE = 16
_MULTIPLE = 64
"""Rows get a length that tensor ranks can share, and of which kernels meet few."""


class Reason(StrEnum):
    """Why a prompt gives no record."""

    TOO_LONG = "tooLong"
    TEMPLATE = "template"
    EMPTY = "empty"
    UNFINISHED = "unfinished"
    ENDPOINT = "endpoint"
    RUBBISH = "rubbish"
    EQUAL = "equal"
    TIE = "tie"

    @property
    def is_failure(self) -> bool:
        """Whether it counts against maxFailedShare: that two answers are as good as each other is nobody's fault."""
        return self not in (Reason.EQUAL, Reason.TIE)


REMEDIES = {
    Reason.TOO_LONG: "raise sequenceLength, or lower maxNewTokens and critic.maxNewTokens",
    Reason.TEMPLATE: "change the prompts, or chatTemplate",
    Reason.EMPTY: "train the model to answer first",
    Reason.UNFINISHED: "raise maxNewTokens, or train the model to end its answers",
    Reason.ENDPOINT: "see to critic.endpoint, or raise its timeout or retries",
    Reason.RUBBISH: "choose a critic that answers what is asked, or word the principles more clearly",
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """No reply."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Said:
    """A reply."""

    text: str
    ended: bool = True
    """Whether it is whole, and not cut for its length."""


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How replies are drawn."""

    max_new_tokens: int
    temperature: float


class Speaker(Protocol):
    """Answers questions. Every rank of the gang calls each method as often as the others, those of a replica with the
    same questions; the answers are the same on every rank of the replica."""

    def say(self, asks: Sequence[Ask], manner: Manner) -> list[Said | Failure]:
        """A reply to each."""

    def choose(self, asks: Sequence[Ask]) -> list[float | Failure]:
        """Of each, the probability of the first option, given that it is one of the two."""


class ModelSpeaker:
    """A model on this mesh.

    Args:
        model: a language model, to be evaluated.
        tokenizer: a folder with the model's.
        stop_tokens: that end a reply.
        length: tokens of a question with its reply.
        seed: of the run.
        gang: this rank's place.
    """

    def __init__(
        self,
        model: MegatronModule,
        *,
        tokenizer: Path,
        stop_tokens: frozenset[int],
        length: int,
        seed: int,
        gang: Gang,
    ) -> None:
        self._model, self._stop_tokens, self._gang = model, stop_tokens, gang
        self._encoder = Encoder(tokenizer, sequence_length=length)
        self._length, self._seed = length, seed

    def say(self, asks: Sequence[Ask], manner: Manner) -> list[Said | Failure]:
        """See ``Speaker``. A reply's draws are a function of the seed and the question's id."""
        replies: list[Said | Failure] = [Failure(reason=Reason.TOO_LONG)] * len(asks)
        places, prompts = [], []
        for i, tokens in enumerate(self._prompts(asks)):
            if isinstance(tokens, Failure):
                replies[i] = tokens
            elif len(tokens) + manner.max_new_tokens <= self._length:
                places.append(i)
                prompts.append(Prompt(id=asks[i].id, tokens=tokens))
        if not prompts:
            return replies
        sampling = Sampling(
            max_new_tokens=manner.max_new_tokens,
            temperature=manner.temperature,
            stop_tokens=self._stop_tokens,
            seed=self._seed,
        )
        made = generate(self._model, prompts, sampling, gang=self._gang)
        for i, completion in zip(places, made, strict=True):
            replies[i] = Said(text=self._text(completion.tokens), ended=completion.stopped)
        return replies

    def choose(self, asks: Sequence[Ask]) -> list[float | Failure]:
        """See ``Speaker``: by the log-probabilities of both replies, each to its end."""
        chosen: list[float | Failure] = [Failure(reason=Reason.TOO_LONG)] * len(asks)
        places: list[int] = []
        documents: list[Document] = []
        for i, pair in enumerate(self._choices(asks)):
            if isinstance(pair, Failure):
                chosen[i] = pair
            else:
                places.append(i)
                documents += pair
        sums = self._log_probs(documents)
        for i, first, second in zip(places, sums[::2], sums[1::2], strict=True):
            chosen[i] = float(torch.sigmoid(torch.tensor(first - second, dtype=torch.float64)))
        return chosen

    def _prompts(self, asks: Sequence[Ask]) -> list[list[int] | Failure]:
        records = [PromptRecord(place=_place(ask), prompt=ask.text, tools=ask.tools, others={}) for ask in asks]
        found: list[list[int] | Failure] = []
        for encoded in self._encoder.encode(records):
            if isinstance(encoded, BadRecord):
                found.append(_unusable(encoded))
            elif encoded.unit is None:
                found.append(Failure(reason=Reason.TOO_LONG))
            else:
                found.append(encoded.unit[0].tokens.tolist())
        return found

    def _choices(self, asks: Sequence[Ask]) -> list[tuple[Document, Document] | Failure]:
        """Each question with either reply."""
        records = []
        for ask in asks:
            assert ask.options is not None
            records += [
                CompletionRecord(place=_place(ask), prompt=ask.text, completion=as_answer(ask.text, option))
                for option in ask.options
            ]
        encoded = list(self._encoder.encode(records))
        return [_pair(one, other) for one, other in zip(encoded[::2], encoded[1::2], strict=True)]

    def _log_probs(self, documents: Sequence[Document]) -> list[float]:
        """Of what is trained on in each, summed, in nats."""
        found: list[float] = []
        longest = max((len(document) for document in documents), default=0)
        length = -(-longest // _MULTIPLE) * _MULTIPLE
        for first in range(0, len(documents), _ROWS_AT_ONCE):
            some = documents[first : first + _ROWS_AT_ONCE]
            rows = [collate(Pack(documents=(d,)), length=length, device=self._gang.device) for d in some]
            scores = log_probs(self._model, rows)
            found += [float((row_T * row.mask_1T[0]).double().sum()) for row, row_T in zip(rows, scores, strict=True)]
            board.beat()
        return found

    def _text(self, tokens: list[int]) -> str:
        return str(self._encoder.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _place(ask: Ask) -> Place:
    return Place(file=ask.id, number=1)


def _pair(one: Encoded | BadRecord, other: Encoded | BadRecord) -> tuple[Document, Document] | Failure:
    if isinstance(one, BadRecord) or isinstance(other, BadRecord):
        return _unusable(one if isinstance(one, BadRecord) else other)
    if one.unit is None or other.unit is None or one.truncated or other.truncated:
        return Failure(reason=Reason.TOO_LONG)
    return one.unit[0], other.unit[0]


def _unusable(bad: Encoded | BadRecord) -> Failure:
    assert isinstance(bad, BadRecord)
    return Failure(reason=Reason.TEMPLATE, detail=f"{bad.reason}: {bad.detail}")
