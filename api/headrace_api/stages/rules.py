"""Rules that judge an answer by what is known of a right one: of the rewards of ``rl``, and of a constitution's principles.

The trainer's ``rules`` carries them out.
"""

import json
import re
from typing import Any, Self

from pydantic import Field, model_validator

from headrace_api.base import FieldError, Line, Quantity, Spec, api_rules, rule


class ExactMatch(Spec):
    """1 where the answer is the text that is wanted, surrounding white space aside, else 0."""

    column: Line = Field("answer", max_length=128)
    """column is the prompt records' column that holds the wanted text."""
    ignore_case: bool = False
    """ignoreCase takes upper-case and lower-case letters for the same."""


class Numeric(Spec):
    """1 where the answer's last number is the number that is wanted, else 0."""

    column: Line = Field("answer", max_length=128)
    """column is the prompt records' column that holds the wanted number, or a text whose last number it is."""
    tolerance: float = Field(0.0, ge=0)
    """tolerance is how far the answer's number may be off."""


class Regex(Spec):
    """1 where a pattern is found in the answer, else 0."""

    pattern: str = Field(min_length=1, max_length=4096)
    """pattern is a regular expression of Python's; ^ and $ hold it to the whole answer."""

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise FieldError("pattern", self.pattern, f"is not a regular expression: {error}") from error
        return self


class JsonSchema(Spec):
    """1 where the answer is JSON that a schema describes, else 0."""

    schema_text: str = Field(min_length=2, max_length=65_536, alias="schema")
    """schema is a JSON Schema (draft 2020-12), as JSON text. What it refers to must be in it; nothing is fetched."""

    @property
    def parsed(self) -> Any:
        """The schema as JSON values."""
        return json.loads(self.schema_text)

    @model_validator(mode="after")
    def _is_json(self) -> Self:
        try:
            parsed = json.loads(self.schema_text)
        except ValueError as error:
            raise FieldError("schema", self.schema_text[:80], f"is not JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise FieldError("schema", self.schema_text[:80], 'is not a JSON object; write one, as {"type": "object"}')
        return self


class PythonTests(Spec):
    """1 where the answer's code passes the record's tests, else 0. It runs in processes of its own, with limits and without a network."""

    column: Line = Field("tests", max_length=128)
    """column is the prompt records' column that holds the tests: Python that raises where the code is wrong."""
    seconds: int = Field(5, ge=1, le=600)
    """seconds is the processor time that one answer may take; in real time, it may take four times as long."""
    memory: Quantity = Field(512 * 2**20, ge=64 * 2**20, le=2**40)
    """memory is the bytes that one answer may allocate."""


_ONE_RULE = "set exactly one of exactMatch, numeric, regex, jsonSchema and pythonTests"
_RULES = ("exactMatch", "numeric", "regex", "jsonSchema", "pythonTests")
_COUNT_RULES = " + ".join(f"(has(self.{name}) ? 1 : 0)" for name in _RULES)


class RuleReward(Spec):
    """One rule: 1 where the answer is as it says, else 0."""

    model_config = api_rules(rule(f"{_COUNT_RULES} == 1", _ONE_RULE))

    exact_match: ExactMatch | None = None
    """exactMatch compares the answer with a text."""
    numeric: Numeric | None = None
    """numeric compares the answer's last number with a number."""
    regex: Regex | None = None
    """regex looks for a pattern."""
    json_schema: JsonSchema | None = None
    """jsonSchema checks that the answer is JSON of a form."""
    python_tests: PythonTests | None = None
    """pythonTests runs the answer as code, then tests."""

    @property
    def kind(self) -> str:
        """The name of the block that is set."""
        return next(iter(self.dump()))

    @property
    def block(self) -> ExactMatch | Numeric | Regex | JsonSchema | PythonTests:
        """The block that is set."""
        blocks = (self.exact_match, self.numeric, self.regex, self.json_schema, self.python_tests)
        return next(block for block in blocks if block is not None)

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        said = [name for name in _RULES if name in self.dump()]
        if len(said) != 1:
            raise FieldError("", " and ".join(said) if said else "none", _ONE_RULE)
        return self
