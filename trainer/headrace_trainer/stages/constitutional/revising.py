"""Answers, criticized and revised: one unit of prompts on one replica.

In: prompts and who speaks. Out: a ``Transcript`` of each. A prompt that fails at one step takes no part in the next ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headrace_api.stages import Constitutional
from headrace_api.stages.constitutional import ConstitutionFile, Principle, Reviser
from headrace_trainer.stages.constitutional import asking
from headrace_trainer.stages.constitutional.asking import Ask
from headrace_trainer.stages.constitutional.constitution import drawn
from headrace_trainer.stages.constitutional.speakers import Failure, Manner, Said, Speaker
from headrace_trainer.stages.constitutional.transcripts import Asked, Pass, Transcript, usable, violations


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Who speaks, and by what."""

    config: Constitutional
    constitution: ConstitutionFile
    model: Speaker
    critic: Speaker
    seed: int
    pause: Callable[[], None]
    """Called between steps by every rank of the gang; it raises where all are to stop."""

    @property
    def answering(self) -> Manner:
        """How answers are drawn."""
        return Manner(max_new_tokens=self.config.max_new_tokens, temperature=self.config.temperature)

    @property
    def criticizing(self) -> Manner:
        """How critiques and thoughts are drawn."""
        return Manner(max_new_tokens=self.config.critic.max_new_tokens, temperature=self.config.critic.temperature)

    def principle(self, asked: Asked, index: int) -> Principle:
        """That of a pass over a prompt."""
        return drawn(self.constitution, seed=self.seed, number=asked.number, index=index)


def answered(parts: Parts, prompts: Sequence[Asked], *, name: str, whole: bool) -> list[Transcript]:
    """First answers.

    Args:
        parts: who speaks.
        prompts: this replica's.
        name: of the answer, where a prompt gets several.
        whole: whether an answer must have ended.
    """
    asks = [Ask(id=f"{p.number}:{name}", text=p.prompt, tools=p.tools) for p in prompts]
    found = []
    for asked, reply in zip(prompts, parts.model.say(asks, parts.answering), strict=True):
        begun = Transcript(asked=asked)
        text = usable(reply, whole=whole, plain=isinstance(asked.prompt, str))
        failed = isinstance(text, Failure)
        found.append(begun.without_record(text, step="answer") if failed else replace(begun, answers=(text,)))
    parts.pause()
    return found


def revised(parts: Parts, prompts: Sequence[Asked]) -> list[Transcript]:
    """Go through all passes. Every rank of the gang calls, with its replica's prompts, which may be none."""
    transcripts = answered(parts, prompts, name="answer", whole=False)
    for index in range(parts.config.passes):
        transcripts = _criticized(parts, transcripts, index)
        transcripts = _better(parts, transcripts, index)
    return _with_violations(parts, transcripts)


def _criticized(parts: Parts, transcripts: Sequence[Transcript], index: int) -> list[Transcript]:
    def ask(t: Transcript) -> Ask:
        text = asking.critique(t.asked.prompt, t.last, parts.principle(t.asked, index))
        return Ask(id=f"{t.asked.number}:{index}:critique", text=text, tools=t.asked.tools)

    def take(t: Transcript, said: str) -> Transcript:
        step = Pass(principle=parts.principle(t.asked, index).name, critique=said)
        return replace(t, passes=(*t.passes, step))

    return _step(parts, transcripts, ask, take, speaker=parts.critic, manner=parts.criticizing, step="critique")


def _better(parts: Parts, transcripts: Sequence[Transcript], index: int) -> list[Transcript]:
    def ask(t: Transcript) -> Ask:
        principle = parts.principle(t.asked, index)
        text = asking.revision(t.asked.prompt, t.last, t.passes[-1].critique, principle)
        return Ask(id=f"{t.asked.number}:{index}:revision", text=text, tools=t.asked.tools)

    def take(t: Transcript, said: str) -> Transcript:
        return replace(t, passes=(*t.passes[:-1], replace(t.passes[-1], revision=said)))

    by_critic = parts.config.critic.revisions is Reviser.CRITIC
    speaker = parts.critic if by_critic else parts.model
    return _step(parts, transcripts, ask, take, speaker=speaker, manner=parts.answering, step="revision")


def _step(
    parts: Parts,
    transcripts: Sequence[Transcript],
    ask: Callable[[Transcript], Ask],
    take: Callable[[Transcript, str], Transcript],
    *,
    speaker: Speaker,
    manner: Manner,
    step: str,
) -> list[Transcript]:
    """Ask about every transcript that has not failed, and take up what is said."""
    asks = [ask(t) for t in transcripts if t.left_out is None]
    replies = iter(speaker.say(asks, manner))
    parts.pause()

    def one(t: Transcript, reply: Said | Failure) -> Transcript:
        text = usable(reply, whole=step == "revision", plain=isinstance(t.asked.prompt, str))
        return t.without_record(text, step=step) if isinstance(text, Failure) else take(t, text)

    return [t if t.left_out is not None else one(t, next(replies)) for t in transcripts]


def _with_violations(parts: Parts, transcripts: Sequence[Transcript]) -> list[Transcript]:
    """By the rules on every answer; by the critic for the principles without one, where they were drawn."""
    principles = parts.constitution.principles
    judged = [
        t
        if t.left_out is not None
        else replace(
            t,
            before=violations(principles, t.answers[0], t.asked.columns),
            after=violations(principles, t.last, t.asked.columns),
        )
        for t in transcripts
    ]
    if all(principle.rule is not None for principle in principles):
        return judged
    asks = [ask for t in judged if t.left_out is None for ask in _doubts(parts, t)]
    verdicts = dict(zip((ask.id for ask in asks), parts.critic.choose(asks), strict=True))
    parts.pause()
    return [t if t.left_out is not None else _with_verdicts(parts, t, verdicts) for t in judged]


def _by_critic(parts: Parts, transcript: Transcript) -> list[Principle]:
    """The principles of a transcript that have no rule."""
    used = {p.principle for p in transcript.passes}
    return [p for p in parts.constitution.principles if p.rule is None and p.name in used]


def _doubts(parts: Parts, transcript: Transcript) -> list[Ask]:
    asked, sides = transcript.asked, (("before", transcript.answers[0]), ("after", transcript.last))
    return [
        Ask(
            id=f"{asked.number}:{principle.name}:{side}",
            text=asking.violation(asked.prompt, answer, principle),
            tools=asked.tools,
            options=asking.yes_or_no(asked.prompt),
        )
        for principle in _by_critic(parts, transcript)
        for side, answer in sides
    ]


def _with_verdicts(parts: Parts, transcript: Transcript, verdicts: dict[str, float | Failure]) -> Transcript:
    found: dict[str, dict[str, bool]] = {"before": dict(transcript.before), "after": dict(transcript.after)}
    for principle in _by_critic(parts, transcript):
        for side, of_side in found.items():
            verdict = verdicts[f"{transcript.asked.number}:{principle.name}:{side}"]
            if isinstance(verdict, Failure):
                return transcript.without_record(verdict, step="violation")
            of_side[principle.name] = verdict > 0.5
    return replace(transcript, before=found["before"], after=found["after"])
