"""The same prompts answered before and after a stage, greedily, so that people see what it changed.

In: a stage's records and its model, at the start and at the end. Out: ``formats.samples``' page in the stage's output, and how
many answers are exactly the wanted ones. The answers from before are kept in storage: a resumed attempt has other weights.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headrace_api.stages.finetune import Samples
from headrace_trainer.engine.answers import Answered, Question, answers
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.formats.dataset import Dataset
from headrace_trainer.formats.model_card import ModelCard
from headrace_trainer.formats.packs import Document
from headrace_trainer.formats.samples import Answer, Page, Sample, write_samples
from headrace_trainer.storage import ObjectStore

_LOOKED_AT = 64
"""Units that are looked at for each prompt that is wanted: plain text asks nothing."""


class Comparison:
    """The samples of a stage. Every rank calls the same methods.

    Args:
        settings: how many, and how long answers may be.
        dataset: the stage's; held-out records come first.
        tokenizer: of ``transformers``.
        card: of the model.
        gang: this rank's place.
    """

    def __init__(self, settings: Samples, dataset: Dataset, *, tokenizer: Any, card: ModelCard, gang: Gang) -> None:
        self._dataset, self._tokenizer, self._card, self._gang = dataset, tokenizer, card, gang
        self._room = min(settings.max_new_tokens, card.sequence_length // 2)
        found = _questions(dataset, tokenizer, longest=card.sequence_length - self._room, most=settings.count)
        self.questions = list(itertools.islice(found, settings.count))
        self._before: list[Answered] = []

    def key(self, *parts: str) -> str:
        """What the answers from before depend on, besides ``parts``."""
        asked = [list(question.tokens) for question in self.questions]
        return hashlib.sha256(json.dumps([*parts, self._room, self._card.stop_ids, asked]).encode()).hexdigest()

    def recall(self, store: ObjectStore, key: str) -> bool:
        """Take the answers from before from storage; whether they are there."""

        def stored() -> bytes | None:
            return store.get_bytes(key) if store.exists(key) else None

        found = self._gang.from_first(stored)
        if found is None:
            return False
        self._before = [Answered(**answer) for answer in json.loads(found)]
        return True

    def ask_before(self, model: Any, store: ObjectStore, key: str) -> None:
        """Ask the model from before, and keep what it says in storage."""
        self._before = self._ask(model)
        text = json.dumps([asdict(answer) for answer in self._before])
        self._gang.from_first(lambda: store.put_bytes(key, text.encode()))

    def ask_after(self, model: Any, folder: Path, *, kind: str) -> dict[str, float]:
        """Ask the model from after, write the page, and say what share of the wanted answers was given.

        Args:
            model: the trained one.
            folder: where the page goes.
            kind: of the stage.
        """
        page = Page(
            kind=kind,
            samples=[_sample(*both) for both in zip(self._before, self._ask(model), strict=True)],
            held_out=self._dataset.validation is not None,
            max_tokens=self._room,
        )
        if self._gang.is_first:
            write_samples(page, folder)
        wanted, before, after = page.exact()
        return {"exactMatch": after / wanted, "exactMatchBefore": before / wanted} if wanted else {}

    def _ask(self, model: Any) -> list[Answered]:
        return answers(
            model,
            self.questions,
            tokenizer=self._tokenizer,
            card=self._card,
            max_tokens=self._room,
            gang=self._gang,
        )


def _sample(before: Answered, after: Answered) -> Sample:
    def shown(given: Answered) -> Answer:
        return Answer(text=given.said, ended=given.ended, is_right=given.is_right if given.right else None)

    return Sample(prompt=before.question, wanted=before.right or None, before=shown(before), after=shown(after))


def _questions(dataset: Dataset, tokenizer: Any, *, longest: int, most: int) -> Iterator[Question]:
    """The first prompts of the held-out records, or of all where none are held out; each once."""
    units = dataset.validation if dataset.validation is not None else dataset.train
    seen: set[tuple[int, ...]] = set()
    for number in range(min(len(units), most * _LOOKED_AT)):
        document = units[number][0]
        asked, ends = _spans(document)
        tokens = tuple(document.tokens[:asked].tolist())
        # One token is where a text begins, and asks nothing.
        if not 1 < asked <= longest or tokens in seen:
            continue
        seen.add(tokens)
        is_wanted = document.label is not False
        yield Question(
            text=_text(tokenizer, tokens, special=True),
            right=_text(tokenizer, document.tokens[asked:ends].tolist(), special=False) if is_wanted else "",
            tokens=tokens,
        )


def _spans(document: Document) -> tuple[int, int]:
    """Where the first answer begins and ends; both are the end where there is none."""
    if not document.mask.any():
        return len(document), len(document)
    asked = int(document.mask.argmax())
    rest = document.mask[asked:]
    return asked, asked + (len(rest) if rest.all() else int(rest.argmin()))


def _text(tokenizer: Any, tokens: Sequence[int], *, special: bool) -> str:
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    return text
