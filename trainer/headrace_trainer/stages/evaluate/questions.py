"""Questions with one right answer each.

In: records with prompt and completion. Out: the questions as tokens; ``engine.answers`` asks them. A model with a chat
template is asked in that template. A base model has none: it gets the text of the turns, one per line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_api.run import Storage
from headrace_api.stages.evaluate import QuestionSet
from headrace_trainer.engine.answers import Question
from headrace_trainer.errors import UserError
from headrace_trainer.formats.chat import Encoded, Encoder
from headrace_trainer.formats.records import BadRecord, CompletionRecord, PromptRecord, Shape, find_source, read_records
from headrace_trainer.formats.records.shapes import Text


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question set, read and encoded."""

    metric: str
    questions: Sequence[Question]
    max_tokens: int
    """The longest answer, in tokens."""
    encoder: Encoder


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
