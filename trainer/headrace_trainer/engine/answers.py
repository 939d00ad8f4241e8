"""What a model answers, decoded greedily: to an evaluation's questions, and to the samples of a stage that trains.

In: prompts as tokens, some with the answer that is wanted. Out: answers as text, the same on every rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from headrace_trainer.engine.generation import Prompt, generate
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.sampling import Sampling
from headrace_trainer.formats.model_card import ModelCard

_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, as text and as tokens."""

    text: str
    right: str
    """The wanted answer; empty where none is."""
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A prompt and the model's answer."""

    question: str
    right: str
    said: str
    ended: bool
    """Whether the model ended the answer, rather than reaching the limit."""

    @property
    def is_right(self) -> bool:
        """Whether the answer is exactly the right one, ignoring white space around it."""
        return self.ended and self.said.strip() == self.right.strip()


def answers(
    model: Any,
    questions: Sequence[Question],
    *,
    tokenizer: Any,
    card: ModelCard,
    max_tokens: int,
    gang: Gang,
    tell: Callable[[int], None] = lambda done: None,
) -> list[Answered]:
    """The model's answer to each question. Every rank calls it.

    A model without a chat template knows no way to end an answer: its answer is the next line.

    Args:
        model: a language model; it may be in the middle of its training, its weights gathered.
        questions: any number.
        tokenizer: of ``transformers``.
        card: holds the tokens that end an answer.
        max_tokens: the longest answer, in tokens.
        gang: this rank's place.
        tell: called with the number of questions answered so far.
    """
    stops = frozenset(card.stop_ids or (card.eod_id,))
    sampling = Sampling(max_new_tokens=max_tokens, temperature=0, stop_tokens=stops)
    found: list[Answered] = []
    for first in range(0, len(questions), _AT_ONCE):
        batch = questions[first : first + _AT_ONCE]
        prompts = [Prompt(id=str(first + i), tokens=question.tokens) for i, question in enumerate(batch)]
        for question, completion in zip(batch, generate(model, prompts, sampling, gang=gang), strict=True):
            said = tokenizer.decode(completion.tokens, skip_special_tokens=True)
            ended = completion.stopped
            if tokenizer.chat_template is None:
                said, line_end, _ = said.partition("\n")
                ended = ended or bool(line_end)
            found.append(Answered(question=question.text, right=question.right, said=said, ended=ended))
        tell(first + len(batch))
    return found
