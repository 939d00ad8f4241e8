"""An iteration's answers: what was drawn, what the models say of each token, and what each reward says.

They travel in checkpoints that are made before all of them were trained on.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from headrace_trainer.formats.packs import Document


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """One answer to one prompt; arrays hold a number for each of its tokens."""

    prompt: np.ndarray
    """int64, at least one."""
    tokens: np.ndarray
    """int64, at least one; the token that ends it included."""
    stopped: bool
    """Whether it ended by itself."""
    sampled: np.ndarray
    """float32: log-probabilities as they were when it was drawn, in nats."""
    log_probs: np.ndarray
    """float32: as the trainer computes them from the same weights."""
    reference: np.ndarray | None = None
    """float32: under the model that the policy is held to."""
    values: np.ndarray | None = None
    scores: tuple[float, ...] = ()
    """Of each reward, unweighted; NaN where it could not be had."""
    timed_out: int = 0
    """Rules that did not come to an end."""

    @property
    def document(self) -> Document:
        """Prompt and answer, of which the answer is trained on."""
        return Document(
            tokens=np.concatenate([self.prompt, self.tokens]),
            mask=np.repeat([False, True], [len(self.prompt), len(self.tokens)]),
        )


_PER_TOKEN = ("tokens", "sampled", "log_probs", "reference", "values")


def dumps(answers: Sequence[Answer]) -> str:
    """As text that ``loads`` takes."""
    arrays = {
        "prompt_lengths": np.array([len(a.prompt) for a in answers]),
        "lengths": np.array([len(a.tokens) for a in answers]),
        "prompt": np.concatenate([a.prompt for a in answers]),
        "stopped": np.array([a.stopped for a in answers]),
        "scores": np.array([a.scores for a in answers], dtype=np.float64),
        "timed_out": np.array([a.timed_out for a in answers]),
    }
    for name in _PER_TOKEN:
        if getattr(answers[0], name) is not None:
            arrays[name] = np.concatenate([getattr(a, name) for a in answers])
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return base64.b64encode(out.getvalue()).decode()


def loads(text: str) -> list[Answer]:
    """What ``dumps`` gave, bit for bit."""
    found = np.load(io.BytesIO(base64.b64decode(text)))
    prompts = np.split(found["prompt"], np.cumsum(found["prompt_lengths"])[:-1])
    cuts = np.cumsum(found["lengths"])[:-1]
    per_token = {name: np.split(found[name], cuts) for name in _PER_TOKEN if name in found.files}
    return [
        Answer(
            prompt=prompt,
            stopped=bool(found["stopped"][i]),
            scores=tuple(float(score) for score in found["scores"][i]),
            timed_out=int(found["timed_out"][i]),
            **{name: parts[i] for name, parts in per_token.items()},
        )
        for i, prompt in enumerate(prompts)
    ]


def with_arrays(answers: Sequence[Answer], name: str, arrays: Sequence[np.ndarray]) -> list[Answer]:
    """The answers with one more number for each of their tokens."""
    return [replace(a, **{name: array}) for a, array in zip(answers, arrays, strict=True)]
