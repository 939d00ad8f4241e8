"""Rules on an answer's text. No engine, no model.

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

from headrace_api.stages.rules import ExactMatch, JsonSchema, Numeric, PythonTests, Regex, RuleReward
from headrace_trainer.errors import UserError
from headrace_trainer.rules.sandbox import Limits, passes

Columns = Mapping[str, Any]
"""What a prompt's record holds besides the prompt."""

_SECONDS = 2.0
"""Processor time that a rule without a limit of its own may take for one answer."""
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


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


def check_columns(rule: RuleReward, columns: Columns, *, place: str, field: str) -> None:
    """Refuse a record that the rule cannot use.

    Args:
        rule: exactly one kind of it.
        columns: of the prompt's record.
        place: what people call the record.
        field: what the manifest calls the rule, as ``rl.rewards``.

    Raises:
        UserError: a column is missing, or holds no number where one is needed.
    """
    block = rule.block
    column = getattr(block, "column", None)
    if column is not None and columns.get(column) is None:
        there = ", ".join(sorted(name for name, value in columns.items() if value is not None)) or "nothing"
        raise UserError(
            f"{field}: {rule.kind}: {place} has no column {column!r}, only {there}: add it, or set {rule.kind}.column"
        )
    if isinstance(block, Numeric) and last_number(str(columns[block.column])) is None:
        raise UserError(f"{field}: numeric: {place}: {block.column!r} is {columns[block.column]!r}: write a number")


def check_rule(rule: RuleReward, *, field: str) -> None:
    """Refuse a schema that is none.

    Args:
        rule: exactly one kind of it.
        field: what the manifest calls it.

    Raises:
        UserError: where, and why.
    """
    if isinstance(rule.block, JsonSchema):
        _check_schema(rule.block.parsed, field=f"{field}: jsonSchema")


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
    """Whether JSON is what a schema describes that ``check_rule`` let through."""
    # Imported here: most rules need none of it.
    from jsonschema import Draft202012Validator
    from referencing import Registry

    # An empty registry: what a schema refers to is never fetched.
    return bool(Draft202012Validator(schema, registry=Registry()).is_valid(value))


def _check_schema(schema: Any, *, field: str) -> None:
    from jsonschema import Draft202012Validator, SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    try:
        Draft202012Validator.check_schema(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    except SchemaError as error:
        raise UserError(f"{field}: {error.json_path}: {error.message}") from error
    resolver = Registry().resolver_with_root(DRAFT202012.create_resource(schema))
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable as error:
            raise UserError(
                f"{field}: $ref: {reference!r}: not found in the schema, and nothing is fetched: put it under $defs"
            ) from error


def _references(schema: Any) -> Iterator[str]:
    inside = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
        yield schema["$ref"]
    for part in inside:
        yield from _references(part)


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
