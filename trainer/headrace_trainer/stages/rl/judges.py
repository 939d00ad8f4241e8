"""What an answer is worth: rules on its text, and a reward model on its tokens.

In: the answers of one replica. Out: a score of each, which is NaN where it could not be had.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import orjson
import torch

from headrace_api.stages.rules import RuleReward
from headrace_trainer import board
from headrace_trainer.engine.packed import PackedBatch
from headrace_trainer.rules import Verdict, judge
from headrace_trainer.stages.rl.answers import Answer
from headrace_trainer.stages.rl.passes import over_answers


class Judge(Protocol):
    """Scores answers. Every rank of the replica calls, with the same answers."""

    def verdicts(self, answers: Sequence[Answer], notes: Sequence[bytes]) -> list[Verdict]:
        """One for each answer; what other ranks than the first of the replica say is not looked at."""


@dataclass(frozen=True, kw_only=True)
class RuleJudge:
    """A rule on the text."""

    rule: RuleReward
    tokenizer: Any
    """Of ``transformers``."""
    decides: bool
    """Whether this rank is the one of its replica that does the work."""

    def verdicts(self, answers: Sequence[Answer], notes: Sequence[bytes]) -> list[Verdict]:
        """By the rule, one answer after the other."""
        return [
            self._verdict(a, note) if self.decides else Verdict(score=0.0)
            for a, note in zip(answers, notes, strict=True)
        ]

    def _verdict(self, answer: Answer, note: bytes) -> Verdict:
        board.beat()
        text = self.tokenizer.decode(
            answer.tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return judge(self.rule, text, orjson.loads(note))


@dataclass(frozen=True, kw_only=True)
class ModelJudge:
    """A reward model on prompt and answer: its score of the last token."""

    model: torch.nn.Module
    """With a scalar head."""
    clip: float
    length: int
    """Tokens of a row."""
    device: torch.device

    def verdicts(self, answers: Sequence[Answer], notes: Sequence[bytes]) -> list[Verdict]:
        """By the model; a score that is not a number stays as it is."""
        found = over_answers(self.model, answers, _run, width=1, length=self.length, device=self.device)
        # At each token, of what was read before it: the answer's last token is read by a label that it has not.
        return [Verdict(score=float(np.clip(row[0, -1], -self.clip, self.clip))) for row in found]


def _run(model: torch.nn.Module, row: PackedBatch) -> tuple[torch.Tensor, Any]:
    return row.run(model), lambda output_1T1: _shifted(output_1T1[0, :, 0].float(), row)[None]


def _shifted(scores_T: torch.Tensor, row: PackedBatch) -> torch.Tensor:
    """The score of the token that each position predicts."""
    return torch.cat((scores_T[1:], scores_T[-1:]))
