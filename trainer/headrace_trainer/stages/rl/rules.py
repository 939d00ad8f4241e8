"""Rules that reward an answer by what is known of a right one. No engine, no model.

In: an answer's text and the record of its prompt. Out: 1 or 0, or that the rule did not come to an end. Time is counted in
processor time, so that a loaded machine does not change a reward.
"""

import json
import math
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from headrace_api.stages.rl import ExactMatch, JsonSchema, Numeric, PythonTests, Regex, RuleReward
from headrace_trainer.errors import UserError
from headrace_trainer.stages.rl.sandbox import Limits, passes

Columns = Mapping[str, Any]
"""What a prompt's record holds besides the prompt."""

_SECONDS = 2.0
"""Processor time that a rule without a limit of its own may take for one answer."""
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
_KEYWORDS: dict[str, tuple[type, ...]] = {
    "type": (str, list),
    "enum": (list,),
    "const": (object,),
    "properties": (dict,),
    "required": (list,),
    "additionalProperties": (dict, bool),
    "items": (dict, bool),
    "anyOf": (list,),
    "allOf": (list,),
    "pattern": (str,),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), (int,)),
    **dict.fromkeys(("minimum", "maximum"), (int, float)),
    **dict.fromkeys(("title", "description", "$schema"), (str,)),
}
"""What of JSON Schema is understood, and what may stand there."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a rule says of an answer."""

    score: float
    timed_out: bool = False
    """Whether it did not come to an end in its time, which scores 0."""


class TooLong(Exception):
    """A rule used up its time."""


def judge(rule: RuleReward, answer: str, columns: Columns) -> Verdict:
    """Reward one answer.

    Args:
        rule: exactly one kind of it.
        answer: the text, without special tokens.
        columns: of the prompt's record; ``check_columns`` has seen them.
    """
    block = rule.block
    if isinstance(block, PythonTests):
        limits = Limits(seconds=block.seconds, memory=block.memory)
        ended = passes(code_in(answer), str(columns[block.column]), limits)
        return Verdict(score=float(ended.passed), timed_out=ended.timed_out)
    try:
        with time_limit(_SECONDS):
            return Verdict(score=float(_holds(block, answer, columns)))
    except TooLong:
        return Verdict(score=0.0, timed_out=True)
    except RecursionError:
        return Verdict(score=0.0)


def check_columns(rule: RuleReward, columns: Columns, *, place: str) -> None:
    """Refuse a record that the rule cannot use.

    Raises:
        UserError: a column is missing, or holds no number where one is needed.
    """
    block = rule.block
    column = getattr(block, "column", None)
    if column is not None and columns.get(column) is None:
        there = ", ".join(sorted(name for name, value in columns.items() if value is not None)) or "nothing"
        raise UserError(
            f"rl.rewards: {rule.kind}: {place} has no column {column!r}, only {there}: add it, or set {rule.kind}.column"
        )
    if isinstance(block, Numeric) and last_number(str(columns[block.column])) is None:
        raise UserError(f"rl.rewards: numeric: {place}: {block.column!r} is {columns[block.column]!r}: write a number")


def check_rule(rule: RuleReward) -> None:
    """Refuse a schema that says what is not understood here.

    Raises:
        UserError: a keyword is not known.
    """
    if isinstance(rule.block, JsonSchema):
        _check_schema(rule.block.parsed)


def _holds(block: ExactMatch | Numeric | Regex | JsonSchema, answer: str, columns: Columns) -> bool:
    match block:
        case ExactMatch():
            found, wanted = answer.strip(), str(columns[block.column]).strip()
            return found.casefold() == wanted.casefold() if block.ignore_case else found == wanted
        case Numeric():
            number, right = last_number(answer), last_number(str(columns[block.column]))
            return number is not None and right is not None and abs(number - right) <= block.tolerance
        case Regex():
            return re.search(block.pattern, answer) is not None
        case JsonSchema():
            try:
                value = json.loads(answer, parse_constant=_refuse_constant)
            except ValueError:
                return False
            return conforms(value, block.parsed)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def last_number(text: str) -> float | None:
    """The last finite number of a text, its thousands separated by commas or not; None where there is none."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    try:
        number = float(found[-1].replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def code_in(answer: str) -> str:
    """The last fenced block of Python in an answer; all of it where there is none."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", answer, re.DOTALL)
    return str(blocks[-1]) if blocks else answer


def conforms(value: Any, schema: Any) -> bool:
    """Whether JSON is what a schema describes, by the keywords that ``check_rule`` lets through."""
    if isinstance(schema, bool):
        return schema
    return all(_keyword_holds(value, key, wanted, schema) for key, wanted in schema.items())


def _keyword_holds(value: Any, key: str, wanted: Any, schema: Mapping[str, Any]) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match key:
        case "type":
            return any(_is_type(value, name) for name in ([wanted] if isinstance(wanted, str) else wanted))
        case "enum":
            return any(_equal(value, other) for other in wanted)
        case "const":
            return _equal(value, wanted)
        case "anyOf":
            return any(conforms(value, other) for other in wanted)
        case "allOf":
            return all(conforms(value, other) for other in wanted)
        case "required":
            return not isinstance(value, dict) or all(name in value for name in wanted)
        case "properties":
            return not isinstance(value, dict) or all(
                conforms(value[name], of_name) for name, of_name in wanted.items() if name in value
            )
        case "additionalProperties":
            known = schema.get("properties", {})
            return not isinstance(value, dict) or all(conforms(v, wanted) for k, v in value.items() if k not in known)
        case "items":
            return not isinstance(value, list) or all(conforms(item, wanted) for item in value)
        case "minItems":
            return not isinstance(value, list) or len(value) >= wanted
        case "maxItems":
            return not isinstance(value, list) or len(value) <= wanted
        case "minLength":
            return not isinstance(value, str) or len(value) >= wanted
        case "maxLength":
            return not isinstance(value, str) or len(value) <= wanted
        case "pattern":
            return not isinstance(value, str) or re.search(wanted, value) is not None
        case "minimum":
            return not number or value >= wanted
        case "maximum":
            return not number or value <= wanted
    return True


def _is_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(name, ()))


def _equal(one: Any, other: Any) -> bool:
    """As JSON has it: true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _check_schema(schema: Any) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise UserError(f"rl.rewards: jsonSchema: {schema!r} is not a schema: write an object, true or false")
    for key, wanted in schema.items():
        if key not in _KEYWORDS:
            raise UserError(f"rl.rewards: jsonSchema: {key!r} is not understood here: use {', '.join(_KEYWORDS)}")
        if not isinstance(wanted, _KEYWORDS[key]):
            raise UserError(
                f"rl.rewards: jsonSchema: {key}: {wanted!r} cannot stand there: see the JSON Schema standard"
            )
    names = schema.get("type", [])
    if unknown := [name for name in ([names] if isinstance(names, str) else names) if name not in _TYPES]:
        raise UserError(f"rl.rewards: jsonSchema: type: {unknown[0]!r} is none: use {', '.join(_TYPES)}")
    try:
        re.compile(schema.get("pattern", ""))
    except re.error as error:
        raise UserError(f"rl.rewards: jsonSchema: pattern: {schema['pattern']!r}: {error}: mend it") from error
    for key in ("items", "additionalProperties"):
        if key in schema:
            _check_schema(schema[key])
    for other in (*schema.get("properties", {}).values(), *schema.get("anyOf", ()), *schema.get("allOf", ())):
        _check_schema(other)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TooLong`` in the block once this process has computed for so long; regular expressions notice it too.

    The main thread only, as signals are.
    """

    def end(*_: object) -> None:
        raise TooLong

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before if before is not None else signal.SIG_DFL)
