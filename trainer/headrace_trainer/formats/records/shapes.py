"""The shapes of records, as TRL has them, and one row of a file -> a typed record.

In: a row as JSON values. Out: ``TextRecord``, ``ChatRecord``, ``PromptRecord``, ``CompletionRecord`` or ``PairRecord``; or
``Unusable``. A text is a string, or a list of turns with ``role`` and ``content`` in OpenAI's form.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import orjson

from headrace_trainer.formats.records.bad import Place, Reason, Unusable

Row = Mapping[str, Any]
Turn = dict[str, Any]
Text = str | list[Turn]
"""Plain, or turns of a conversation."""
Tools = list[dict[str, Any]]


class Shape(Enum):
    """Which columns a record has, the most telling first; the value names them."""

    LABEL = ("prompt", "completion", "label")
    PAIR = ("prompt", "chosen", "rejected")
    IMPLICIT_PAIR = ("chosen", "rejected")
    COMPLETION = ("prompt", "completion")
    MESSAGES = ("messages",)
    TEXT = ("text",)
    PROMPT = ("prompt",)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that have to be there."""
        columns: tuple[str, ...] = self.value
        return columns

    def __str__(self) -> str:
        return ", ".join(self.columns)


SFT_SHAPES = frozenset({Shape.TEXT, Shape.MESSAGES, Shape.COMPLETION})
PAIR_SHAPES = frozenset({Shape.PAIR, Shape.IMPLICIT_PAIR})
KTO_SHAPES = frozenset({Shape.LABEL, Shape.PAIR, Shape.IMPLICIT_PAIR})
"""Of a stage that learns from single answers; ``sides`` makes them of pairs."""
PROMPT_SHAPES = frozenset({Shape.PROMPT})

_OPTIONAL = {
    Shape.PAIR: ("margin",),
    Shape.IMPLICIT_PAIR: ("margin",),
}


@dataclass(frozen=True, kw_only=True)
class TextRecord:
    """Text that is learned as a whole."""

    place: Place
    text: str


@dataclass(frozen=True, kw_only=True)
class ChatRecord:
    """A conversation whose assistant turns are learned; at least one is there."""

    place: Place
    messages: list[Turn]
    tools: Tools | None = None


@dataclass(frozen=True, kw_only=True)
class PromptRecord:
    """What a model is asked."""

    place: Place
    prompt: Text
    tools: Tools | None = None
    others: dict[str, Any]
    """The record's other columns, such as the answer that a rule compares with."""


@dataclass(frozen=True, kw_only=True)
class CompletionRecord:
    """A prompt and what follows; both plain or both turns."""

    place: Place
    prompt: Text
    completion: Text
    label: bool | None = None
    """Whether the completion is wanted, where the shape has a label."""
    tools: Tools | None = None


@dataclass(frozen=True, kw_only=True)
class PairRecord:
    """A prompt and two things that may follow, which differ; all plain or all turns."""

    place: Place
    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None = None
    tools: Tools | None = None


Record = TextRecord | ChatRecord | PromptRecord | CompletionRecord | PairRecord


def sides(record: Record) -> tuple[Record, ...]:
    """A pair as two labelled completions, the wanted one first; any other record as it is."""
    if not isinstance(record, PairRecord):
        return (record,)
    labelled = ((record.chosen, True), (record.rejected, False))
    return tuple(
        CompletionRecord(place=record.place, prompt=record.prompt, completion=text, label=label, tools=record.tools)
        for text, label in labelled
    )


def shape_of(row: Row, allowed: Collection[Shape]) -> Shape | None:
    """The most telling of the allowed shapes whose columns the row fills; None where it fills none's."""
    shapes = (shape for shape in Shape if shape in allowed)
    return next((shape for shape in shapes if all(row.get(c) is not None for c in shape.columns)), None)


def columns_read(allowed: Collection[Shape]) -> set[str]:
    """Every column that a record of these shapes may have."""
    return {"tools"} | {c for shape in allowed for c in (*shape.columns, *_OPTIONAL.get(shape, ()))}


def parse(row: Row, shape: Shape, *, place: Place) -> Record:
    """The row as a record.

    Args:
        row: JSON values by column.
        shape: what it has to be.
        place: where it is.

    Raises:
        Unusable: it is not of that shape, or a field holds something that cannot be used.
    """
    for column in shape.columns:
        if row.get(column) is None:
            found = ", ".join(sorted(c for c, v in row.items() if v is not None)) or "nothing"
            raise Unusable(Reason.MISSING_FIELD, f"no {column!r}; there is {found}")
    match shape:
        case Shape.TEXT:
            return TextRecord(place=place, text=_plain(row["text"], "text"))
        case Shape.MESSAGES:
            return ChatRecord(place=place, messages=_conversation(row["messages"]), tools=_tools(row))
        case Shape.PROMPT:
            others = {k: v for k, v in row.items() if k not in ("prompt", "tools")}
            return PromptRecord(place=place, prompt=_prompt(row["prompt"]), tools=_tools(row), others=others)
        case Shape.COMPLETION | Shape.LABEL:
            return _completion(row, shape, place)
        case Shape.PAIR | Shape.IMPLICIT_PAIR:
            return _pair(row, shape, place)


def _completion(row: Row, shape: Shape, place: Place) -> CompletionRecord:
    prompt, completion = _prompt(row["prompt"]), _answer(row["completion"], "completion")
    _check_same_kind(prompt, completion, "completion")
    label = _label(row["label"]) if shape is Shape.LABEL else None
    return CompletionRecord(place=place, prompt=prompt, completion=completion, label=label, tools=_tools(row))


def _pair(row: Row, shape: Shape, place: Place) -> PairRecord:
    chosen, rejected = _text(row["chosen"], "chosen"), _text(row["rejected"], "rejected")
    _check_same_kind(chosen, rejected, "rejected", other="chosen")
    if chosen == rejected:
        raise Unusable(Reason.EQUAL_SIDES, "chosen and rejected are the same")
    prompt = _prompt(row["prompt"]) if shape is Shape.PAIR else None
    if prompt is None or _repeats(prompt, chosen):
        prompt, chosen, rejected = _split(chosen, rejected)
    _check_same_kind(prompt, chosen, "chosen")
    return PairRecord(
        place=place,
        prompt=prompt,
        chosen=_answer(chosen, "chosen"),
        rejected=_answer(rejected, "rejected"),
        margin=_margin(row.get("margin")),
        tools=_tools(row),
    )


def _repeats(prompt: Text, chosen: Text) -> bool:
    """Whether the sides are whole conversations that hold the prompt too, as in UltraFeedback's binarized form."""
    if isinstance(chosen, str):
        return False
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return bool(asked) and [t for t in chosen if t["role"] != "system"][: len(asked)] == asked


def _split(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """The prompt that both sides begin with, and what is left of them.

    Of plain texts, the prompt ends before the white space that precedes the first difference, so that no word is cut.
    What both begin with counts alike in both, so where exactly it is cut does not move a preference loss.
    """
    shorter = min(len(chosen), len(rejected))
    same = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if isinstance(chosen, str):
        same = max((i for i in range(same, -1, -1) if chosen[i : i + 1].isspace()), default=0)
    else:
        same = next((i for i in range(min(same, shorter - 1), -1, -1) if chosen[i]["role"] == "assistant"), 0)
        if same == 0:
            raise Unusable(Reason.BAD_TURN, "chosen and rejected begin with no common turns that are a prompt")
    return chosen[:same], chosen[same:], rejected[same:]


def _plain(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise Unusable(Reason.WRONG_TYPE, f"{column!r} holds {_kind(value)}, not text")
    if not value.strip():
        raise Unusable(Reason.EMPTY, f"{column!r} is empty")
    return value


def _text(value: Any, column: str) -> Text:
    return _turns(value, column) if isinstance(value, list) else _plain(value, column)


def _prompt(value: Any) -> Text:
    prompt = _text(value, "prompt")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise Unusable(Reason.BAD_TURN, "'prompt' ends with a turn of the assistant: nobody has asked")
    return prompt


def _answer(value: Any, column: str) -> Text:
    """What follows a prompt: text, or turns that begin with one of the assistant."""
    answer = _text(value, column)
    if not isinstance(answer, str):
        if answer[0]["role"] != "assistant":
            raise Unusable(
                Reason.BAD_TURN, f"{column!r} begins with a turn of {answer[0]['role']!r}, not of the assistant"
            )
        _check_assistant_speaks(answer, column)
    return answer


def _conversation(value: Any) -> list[Turn]:
    if not isinstance(value, list):
        raise Unusable(Reason.WRONG_TYPE, f"'messages' holds {_kind(value)}, not a list of turns")
    turns = _turns(value, "messages")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise Unusable(
            Reason.NO_ASSISTANT, f"'messages' has turns of {', '.join(sorted({t['role'] for t in turns}))} only"
        )
    _check_assistant_speaks(turns, "messages")
    return turns


def _check_assistant_speaks(turns: list[Turn], column: str) -> None:
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant" and not turn.get("content", "").strip() and not turn.get("tool_calls"):
            raise Unusable(Reason.EMPTY, f"{column}[{i}] is an empty turn of the assistant")


def _turns(value: list[Any], column: str) -> list[Turn]:
    if not value:
        raise Unusable(Reason.EMPTY, f"{column!r} is an empty list")
    return [_turn(turn, f"{column}[{i}]") for i, turn in enumerate(value)]


def _turn(value: Any, place: str) -> Turn:
    """A turn without its empty keys, its content as one text, and arguments of tool calls as objects."""
    if not isinstance(value, dict):
        raise Unusable(Reason.BAD_TURN, f"{place} holds {_kind(value)}, not a turn")
    turn = {k: v for k, v in value.items() if v is not None}
    role = turn.get("role")
    if not isinstance(role, str) or not role:
        known = ", ".join(sorted(turn)) or "nothing"
        raise Unusable(Reason.BAD_TURN, f"{place} has no role; there is {known}")
    if turn.get("tool_calls"):
        turn["tool_calls"] = _tool_calls(turn["tool_calls"], place)
    if "content" in turn:
        turn["content"] = _content(turn["content"], place)
    elif not turn.get("tool_calls"):
        raise Unusable(Reason.BAD_TURN, f"{place} has no content")
    return turn


def _content(value: Any, place: str) -> str:
    """A turn's content as one text; OpenAI's form may have it in parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise Unusable(Reason.BAD_TURN, f"{place}.content holds {_kind(value)}, not text")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
    if not all(isinstance(text, str) for text in texts):
        raise Unusable(Reason.BAD_TURN, f"{place}.content has parts that are not text")
    return "".join(str(text) for text in texts)


def _tool_calls(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise Unusable(Reason.BAD_TURN, f"{place}.tool_calls holds {_kind(value)}, not a list")
    return [_tool_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(value)]


def _tool_call(value: Any, place: str) -> dict[str, Any]:
    """A call with its function's arguments as an object: OpenAI sends them as text, and templates print them as JSON."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable(Reason.BAD_TURN, f"{place} names no function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{place}.function.arguments")
    return {**value, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _tools(row: Row) -> Tools | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable(Reason.WRONG_TYPE, "'tools' is not a list of objects")
    return tools


def _json(text: str, place: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Unusable(Reason.NOT_JSON, f"{place}: {error.msg} at column {error.colno}") from error


def _label(value: Any) -> bool:
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise Unusable(Reason.WRONG_TYPE, f"'label' holds {_kind(value)}, neither true nor false")


def _margin(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable(Reason.WRONG_TYPE, f"'margin' holds {_kind(value)}, not a number")
    if not math.isfinite(value):
        raise Unusable(Reason.NOT_FINITE, f"'margin' is {value}")
    return float(value)


def _check_same_kind(one: Text, value: Text, column: str, *, other: str = "prompt") -> None:
    if isinstance(one, str) != isinstance(value, str):
        kinds = ("text", "a list of turns") if isinstance(one, str) else ("a list of turns", "text")
        raise Unusable(Reason.WRONG_TYPE, f"{other!r} holds {kinds[0]} and {column!r} {kinds[1]}")


def _kind(value: Any) -> str:
    """What a value is, in words of JSON, with a short value itself."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "nothing" if value is None else type(value).__name__)
