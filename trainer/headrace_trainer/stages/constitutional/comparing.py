"""Two answers to each prompt, of which the critic chooses one by a principle: one unit of prompts on one replica.

In: prompts and who speaks. Out: a ``Transcript`` of each. The label is the critic's probability of either letter: after a
chain of thought it is close to 0 or 1 whatever it is worth, so it is clamped (arXiv 2212.08073, section 4.3).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from headrace_api.stages.constitutional import Judgement, Labels, Orders, Preferences
from headrace_trainer.stages.constitutional import asking
from headrace_trainer.stages.constitutional.asking import Ask
from headrace_trainer.stages.constitutional.revising import Parts, answered
from headrace_trainer.stages.constitutional.speakers import Failure, Reason
from headrace_trainer.stages.constitutional.transcripts import Asked, Comparison, Transcript, usable, violations

_EVEN = 1e-6
"""A label this close to one half chooses neither answer."""
_DECIMALS = 3
"""Of a probability: what a layout changes in the last bits of a logit is not kept."""


def compared(parts: Parts, prompts: Sequence[Asked]) -> list[Transcript]:
    """Draw two answers, and choose. Every rank of the gang calls, with its replica's prompts, which may be none."""
    first = answered(parts, prompts, name="first", whole=True)
    second = answered(parts, prompts, name="second", whole=True)
    transcripts = [_pair(parts, one, other) for one, other in zip(first, second, strict=True)]
    views = [
        (i, swapped) for i, t in enumerate(transcripts) if t.left_out is None for swapped in _views(parts, t.asked)
    ]
    thoughts = _thoughts(parts, transcripts, views)
    chosen = _choices(parts, transcripts, views, thoughts)
    for i, _ in views:
        if transcripts[i].left_out is None:
            mine = [(swapped, thoughts[i, swapped], chosen[i, swapped]) for j, swapped in views if j == i]
            transcripts[i] = _labelled(parts, transcripts[i], mine)
    return transcripts


def _pair(parts: Parts, one: Transcript, other: Transcript) -> Transcript:
    if one.left_out is not None or other.left_out is not None:
        return one if one.left_out is not None else replace(other, answers=one.answers)
    pair = replace(one, answers=(*one.answers, *other.answers), principle=parts.principle(one.asked, 0).name)
    same = one.answers[0].strip() == other.answers[0].strip()
    return pair.without_record(Failure(reason=Reason.EQUAL), step="answer") if same else pair


def _views(parts: Parts, asked: Asked) -> tuple[bool, ...]:
    """Whether the second answer is shown first, once for each look at the pair."""
    if parts.config.preferences.orders is Orders.BOTH:
        return False, True
    return (uniform(f"{parts.seed}:{asked.number}:order") < 0.5,)


View = tuple[int, bool]


def _shown(transcript: Transcript, swapped: bool) -> tuple[str, str]:
    one, other = transcript.answers
    return (other, one) if swapped else (one, other)


def _thoughts(
    parts: Parts, transcripts: Sequence[Transcript], views: Sequence[View]
) -> dict[View, str | Failure | None]:
    if parts.config.preferences.judgement is Judgement.DIRECT:
        return dict.fromkeys(views)
    asks = []
    for i, swapped in views:
        t = transcripts[i]
        text = asking.thought(t.asked.prompt, _shown(t, swapped), parts.principle(t.asked, 0))
        asks.append(Ask(id=f"{t.asked.number}:{int(swapped)}:thoughts", text=text))
    replies = parts.critic.say(asks, parts.criticizing)
    parts.pause()
    plain = [isinstance(transcripts[i].asked.prompt, str) for i, _ in views]
    return {
        view: usable(reply, whole=False, plain=is_plain)
        for view, reply, is_plain in zip(views, replies, plain, strict=True)
    }


def _choices(
    parts: Parts,
    transcripts: Sequence[Transcript],
    views: Sequence[View],
    thoughts: dict[View, str | Failure | None],
) -> dict[View, float | Failure]:
    """The probability of what was shown first."""
    asked, asks = [], []
    for view in views:
        t, thought = transcripts[view[0]], thoughts[view]
        if not isinstance(thought, Failure):
            text = asking.choice(t.asked.prompt, _shown(t, view[1]), parts.principle(t.asked, 0), thoughts=thought)
            asks.append(
                Ask(id=f"{t.asked.number}:{int(view[1])}:choice", text=text, options=asking.letters(t.asked.prompt))
            )
            asked.append(view)
    found: dict[View, float | Failure] = {v: t for v, t in thoughts.items() if isinstance(t, Failure)}
    found |= dict(zip(asked, parts.critic.choose(asks), strict=True))
    parts.pause()
    return found


def _labelled(
    parts: Parts,
    transcript: Transcript,
    looks: Sequence[tuple[bool, str | Failure | None, float | Failure]],
) -> Transcript:
    comparisons = []
    for swapped, thoughts, shown_first in looks:
        if isinstance(shown_first, Failure) or isinstance(thoughts, Failure):
            failure = shown_first if isinstance(shown_first, Failure) else thoughts
            assert isinstance(failure, Failure)
            return replace(transcript, comparisons=tuple(comparisons)).without_record(failure, step="comparison")
        probability = round(1 - shown_first if swapped else shown_first, _DECIMALS)
        comparisons.append(Comparison(swapped=swapped, thoughts=thoughts, probability=probability))
    label = label_of([c.probability for c in comparisons], parts.config.preferences)
    transcript = replace(transcript, comparisons=tuple(comparisons), probability=label)
    draw = uniform(f"{parts.seed}:{transcript.asked.number}:label")
    chosen = choose(label, parts.config.preferences.labels, draw=draw)
    if chosen is None:
        return transcript.without_record(Failure(reason=Reason.TIE), step="comparison")
    return replace(
        transcript,
        chosen=chosen,
        before=violations(parts.constitution.principles, transcript.answers[1 - chosen], transcript.asked.columns),
        after=violations(parts.constitution.principles, transcript.answers[chosen], transcript.asked.columns),
    )


def label_of(probabilities: Sequence[float], preferences: Preferences) -> float:
    """The probability that the first answer is the better one: the mean of all looks, clamped after a chain of thought."""
    mean = sum(probabilities) / len(probabilities)
    if preferences.judgement is Judgement.DIRECT:
        return mean
    return min(max(mean, 1 - preferences.clamp), preferences.clamp)


def choose(label: float, labels: Labels, *, draw: float) -> int | None:
    """Which answer is the chosen one; None where both are as good.

    Args:
        label: the probability that it is the first.
        labels: what becomes of a probability.
        draw: uniform in [0, 1).
    """
    if abs(label - 0.5) < _EVEN:
        return None
    return int(draw >= label) if labels is Labels.DRAWN else int(label < 0.5)


def uniform(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48
