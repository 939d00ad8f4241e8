"""What is asked, word for word: critiques, revisions, comparisons, and whether a principle is violated. Pure.

In: a prompt, answers and a principle. Out: what a model is asked, in the form that the prompt has: turns of a
conversation, or plain text that goes on after the prompt, in the words of arXiv 2212.08073, appendix A.
"""

from dataclasses import dataclass

from headrace_api.stages.constitutional import Principle
from headrace_trainer.formats.records.shapes import Text, Tools, Turn

_WHICH = "Which answer is better? Reply with one letter, A or B."
_ANY = "Is there anything to criticize? Reply with one word, Yes or No."


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A question to a model."""

    id: str
    """Names the generator of the reply."""
    text: Text
    tools: Tools | None = None
    options: tuple[str, str] | None = None
    """The only two replies, where it is a choice."""


def critique(prompt: Text, answer: str, principle: Principle) -> Text:
    """Ask what is wrong with an answer."""
    if isinstance(prompt, str):
        return f"{prompt}{answer}\n\nCritique request: {principle.critique_request}\n\nCritique:"
    return [*prompt, _assistant(answer), _user(principle.critique_request)]


def revision(prompt: Text, answer: str, found: str, principle: Principle) -> Text:
    """Ask for a better answer.

    Args:
        prompt: what was asked at first.
        answer: what was said.
        found: the critique of it.
        principle: by which it was criticized.
    """
    asked = critique(prompt, answer, principle)
    if isinstance(asked, str):
        return f"{asked}{found}\n\nRevision request: {principle.revision_request}\n\nRevision:"
    return [*asked, _assistant(found), _user(principle.revision_request)]


def thought(prompt: Text, answers: tuple[str, str], principle: Principle) -> Text:
    """Ask for thoughts on which of two answers is better."""
    question = _comparison(prompt, answers, principle)
    if isinstance(prompt, str):
        return f"{question}\n\nLet's think step by step:"
    return [_user(f"{question}\n\nLet's think step by step.")]


def choice(prompt: Text, answers: tuple[str, str], principle: Principle, *, thoughts: str | None) -> Text:
    """Ask for the letter of the better answer, after thoughts or at once. The options are ``letters``."""
    question = _comparison(prompt, answers, principle)
    if isinstance(prompt, str):
        before = question if thoughts is None else f"{question}\n\nLet's think step by step:{thoughts}"
        return f"{before}\n\nThe better answer is:"
    if thoughts is None:
        return [_user(f"{question}\n\n{_WHICH}")]
    return [_user(f"{question}\n\nLet's think step by step."), _assistant(thoughts), _user(_WHICH)]


def violation(prompt: Text, answer: str, principle: Principle) -> Text:
    """Ask whether an answer violates a principle. The options are ``yes_or_no``."""
    if isinstance(prompt, str):
        return f"{prompt}{answer}\n\nCritique request: {principle.critique_request}\n{_ANY}\n\nReply:"
    return [*prompt, _assistant(answer), _user(f"{principle.critique_request}\n\n{_ANY}")]


def letters(prompt: Text) -> tuple[str, str]:
    """The replies to ``choice``."""
    return (" A", " B") if isinstance(prompt, str) else ("A", "B")


def yes_or_no(prompt: Text) -> tuple[str, str]:
    """The replies to ``violation``."""
    return (" Yes", " No") if isinstance(prompt, str) else ("Yes", "No")


def as_answer(prompt: Text, answer: str) -> Text:
    """An answer in the form that the prompt has."""
    return answer if isinstance(prompt, str) else [_assistant(answer)]


def _comparison(prompt: Text, answers: tuple[str, str], principle: Principle) -> str:
    first, second = answers
    return (
        f"Consider this conversation:\n\n{as_text(prompt)}\n\n{principle.comparison_question}\n\n"
        f"(A) {first.strip()}\n\n(B) {second.strip()}"
    )


def as_text(text: Text) -> str:
    """A conversation on paper."""
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{turn['role']}: {turn.get('content', '')}" for turn in text)


def _user(content: str) -> Turn:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Turn:
    return {"role": "assistant", "content": content}
