"""Questions with one right answer each, and what a model answers to them.

In: records with prompt and completion, and a model. Out: its answers, decoded greedily. A model with a chat template is
asked in that template. A base model has none: it gets the text of the turns, one per line, and its answer is the next
line, because it knows no other way to end one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_api.run import Storage
from headrace_api.stages.evaluate import QuestionSet
from headrace_trainer.engine.generation import Prompt, generate
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.sampling import Sampling
from headrace_trainer.errors import UserError
from headrace_trainer.formats.chat import Encoded, Encoder
from headrace_trainer.formats.model_card import ModelCard
from headrace_trainer.formats.records import BadRecord, CompletionRecord, PromptRecord, Shape, find_source, read_records
from headrace_trainer.formats.records.shapes import Text

_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, as text and as tokens."""

    text: str
    right: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question set, read and encoded."""

    metric: str
    questions: Sequence[Question]
    max_tokens: int
    """The longest answer, in tokens."""
    encoder: Encoder


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question and the model's answer."""

    question: str
    right: str
    said: str
    ended: bool
    """Whether the model ended the answer, rather than reaching the limit."""

    @property
    def is_right(self) -> bool:
        """Whether the answer is exactly the right one, ignoring white space around it."""
        return self.ended and self.said.strip() == self.right.strip()


def read_questions(named: QuestionSet, encoder: Encoder, *, field: str, storage: Storage, scratch: Path) -> Asked:
    """Read the questions of a set.

    Args:
        named: the set.
        encoder: encodes for the model.
        field: the field of the set's address in the manifest.
        storage: the S3 endpoint and region.
        scratch: a folder for files from S3.

    Raises:
        UserError: there are no questions, or one is unusable or longer than the model's context.
    """
    source = find_source(named.uri, storage, field=field)
    scratch.mkdir(parents=True, exist_ok=True)
    records = list(read_records(source, storage, allowed={Shape.COMPLETION}, scratch=scratch))
    found = list(_encoded(records, encoder))
    if not found:
        raise UserError(f"{source.name}: holds no questions; write records with prompt and completion")
    return Asked(metric=named.metric, questions=found, max_tokens=named.max_tokens, encoder=encoder)


def _encoded(records: Sequence[Any], encoder: Encoder) -> Iterator[Question]:
    in_turns = encoder.tokenizer.chat_template is not None
    asked = (_asked(r, in_turns=in_turns) if isinstance(r, CompletionRecord) else r for r in records)
    for record, encoded in zip(records, encoder.encode(asked), strict=True):
        if isinstance(encoded, BadRecord):
            raise UserError(f"{encoded}: mend the record, or remove it")
        assert isinstance(encoded, Encoded)
        if encoded.unit is None:
            raise UserError(f"{record.place}: the prompt is longer than the model's context; shorten or remove it")
        tokens = tuple(encoded.unit[0].tokens.tolist())
        yield Question(text=_plain(record.prompt), right=_plain(record.completion), tokens=tokens)


def _asked(record: CompletionRecord, *, in_turns: bool) -> PromptRecord:
    prompt = record.prompt if in_turns or isinstance(record.prompt, str) else f"{_plain(record.prompt)}\n"
    return PromptRecord(place=record.place, prompt=prompt, tools=record.tools, others={})


def _plain(text: Text) -> str:
    """The text of the turns, one per line."""
    return text if isinstance(text, str) else "\n".join(turn.get("content", "") for turn in text)


def answers(model: Any, asked: Asked, card: ModelCard, *, gang: Gang, tell: Callable[[int], None]) -> list[Answered]:
    """The model's answer to each question. Every rank calls it.

    Args:
        model: from ``load_model``.
        asked: the questions.
        card: holds the tokens that end an answer.
        gang: this rank's place.
        tell: called with the number of questions answered so far.
    """
    stops = frozenset(card.stop_ids or (card.eod_id,))
    sampling = Sampling(max_new_tokens=asked.max_tokens, temperature=0, stop_tokens=stops)
    questions, tokenizer = asked.questions, asked.encoder.tokenizer
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
