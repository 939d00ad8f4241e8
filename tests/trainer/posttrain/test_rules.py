"""Rules that reward answers, and the fence around code that a model wrote."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from headrace_api.stages.rules import RuleReward
from headrace_trainer.errors import UserError
from headrace_trainer.rules.judging import Verdict, check_columns, check_rule, code_in, judge, last_number
from headrace_trainer.rules.sandbox import Ended, Limits, passes

LIMITS = Limits(seconds=1, memory=256 * 2**20)
SCHEMA = (
    '{"type": "object", "required": ["name"], "additionalProperties": false, "properties": {'
    '"name": {"type": "string", "pattern": "^[a-z]+$"}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},'
    '"age": {"type": "integer", "minimum": 0}}}'
)


def rule(**block: Any) -> RuleReward:
    return RuleReward.model_validate(block)


@pytest.mark.parametrize(
    ("block", "answer", "columns", "score"),
    [
        ({"exactMatch": {}}, " Paris\n", {"answer": "Paris"}, 1),
        ({"exactMatch": {}}, "paris", {"answer": "Paris"}, 0),
        ({"exactMatch": {"ignoreCase": True, "column": "city"}}, "paris", {"city": "Paris"}, 1),
        ({"exactMatch": {}}, "", {"answer": "Paris"}, 0),
        ({"numeric": {}}, "so 3 + 4 = 7.", {"answer": 7}, 1),
        ({"numeric": {}}, "it is 1,234.50", {"answer": "#### 1234.5"}, 1),
        ({"numeric": {}}, "7 or 8", {"answer": 7}, 0),
        ({"numeric": {}}, "nothing", {"answer": 7}, 0),
        ({"numeric": {}}, "9e999", {"answer": 7}, 0),
        ({"numeric": {"tolerance": 0.1}}, "6.95", {"answer": 7}, 1),
        ({"regex": {"pattern": "^yes"}}, "yes indeed", {}, 1),
        ({"regex": {"pattern": "^yes"}}, "oh yes", {}, 0),
        ({"jsonSchema": {"schema": SCHEMA}}, '{"name": "ann", "tags": ["a"], "age": 3}', {}, 1),
        ({"jsonSchema": {"schema": SCHEMA}}, '{"name": "Ann"}', {}, 0),
        ({"jsonSchema": {"schema": SCHEMA}}, '{"name": "ann", "age": true}', {}, 0),
        ({"jsonSchema": {"schema": SCHEMA}}, '{"name": "ann", "more": 1}', {}, 0),
        ({"jsonSchema": {"schema": SCHEMA}}, '{"name": "ann", "age": NaN}', {}, 0),
        ({"jsonSchema": {"schema": SCHEMA}}, "[" * 100_000, {}, 0),
        ({"jsonSchema": {"schema": SCHEMA}}, "name: ann", {}, 0),
        (
            {
                "jsonSchema": {
                    "schema": '{"$ref": "#/$defs/a", "$defs": {"a": {"oneOf": [{"const": 1}, {"type": "null"}]}}}'
                }
            },
            "1",
            {},
            1,
        ),
        ({"pythonTests": {}}, "Here:\n```python\ndef f(x):\n    return x + 1\n```\n", {"tests": "assert f(1) == 2"}, 1),
        ({"pythonTests": {}}, "def f(x): return x", {"tests": "assert f(1) == 2"}, 0),
    ],
)
def test_a_rule_gives_one_or_nothing(block: dict[str, Any], answer: str, columns: dict[str, Any], score: int) -> None:
    assert judge(rule(**block), answer, columns) == Verdict(score=score)


@pytest.mark.parametrize(
    "block",
    [{"regex": {"pattern": "^(a+)+$"}}, {"jsonSchema": {"schema": '{"pattern": "^(a+)+$"}'}}],
    ids=["regex", "jsonSchema"],
)
def test_a_rule_that_never_returns_is_counted_and_ends(block: dict[str, Any]) -> None:
    answer = "a" * 60 + "!"
    assert judge(rule(**block), answer if "regex" in block else f'"{answer}"', {}) == Verdict(score=0, timed_out=True)
    assert judge(rule(regex={"pattern": "a"}), "a", {}) == Verdict(score=1)


@pytest.mark.parametrize(
    ("block", "columns", "said"),
    [
        (
            {"exactMatch": {}},
            {"solution": "x"},
            "has no column 'answer', only solution: add it, or set exactMatch.column",
        ),
        ({"numeric": {}}, {"answer": "none"}, "'answer' is 'none': write a number"),
    ],
)
def test_records_that_a_rule_cannot_use_are_refused(block: dict[str, Any], columns: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="prompt 3") as refused:
        check_columns(rule(**block), columns, place="prompt 3", field="rl.rewards")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ('{"properties": {"a": {"items": {"oneOf": []}}}}', "$.properties.a.items.oneOf: [] should be non-empty"),
        ('{"type": "text"}', "$.type: 'text' is not valid"),
        ('{"minimum": "1"}', "$.minimum: '1' is not of type 'number'"),
        ('{"anyOf": [{"pattern": "("}]}', "$.anyOf[0].pattern: '(' is not a 'regex'"),
        ('{"items": {"$ref": "https://host/a.json"}}', "'https://host/a.json': not found in the schema"),
        ('{"items": {"$ref": "#/$defs/a"}}', "'#/$defs/a': not found in the schema"),
    ],
)
def test_a_schema_that_cannot_be_checked_is_refused(schema: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        check_rule(rule(jsonSchema={"schema": schema}), field="rl.rewards")
    assert said in str(refused.value)


def test_numbers_and_code_are_found_in_answers() -> None:
    assert last_number("from -3 to -2.5e2") == -250
    assert code_in("a ```python\none\n``` b ```\ntwo\n```") == "two\n"


@pytest.mark.parametrize(
    ("code", "tests", "ended"),
    [
        ("import json, math", "assert math.sqrt(4) == 2", Ended(passed=True)),
        ("import sys; sys.exit(0)", "assert False", Ended(passed=False)),
        ("import os; os._exit(0)", "assert False", Ended(passed=False)),
        ("not python", "", Ended(passed=False)),
        ("while True: pass", "", Ended(passed=False, timed_out=True)),
        ("import time; time.sleep(100)", "", Ended(passed=False, timed_out=True)),
        ("x = [0] * 10**9", "", Ended(passed=False)),
        ("print('x' * 10**7)", "", Ended(passed=True)),
        ("open('a', 'w').write('x')", "assert open('a').read() == 'x'", Ended(passed=True)),
        ("open('a', 'w').write('x' * 10**7)", "", Ended(passed=False)),
        # No more processes than a few, and not one of 60 is left.
        (
            "import os, time\nfor _ in range(60):\n    if os.fork() == 0:\n        time.sleep(60)",
            "",
            Ended(passed=False),
        ),
    ],
)
def test_code_runs_within_its_limits(code: str, tests: str, ended: Ended) -> None:
    assert passes(code, tests, LIMITS) == ended


def test_code_cannot_open_a_socket() -> None:
    refused = "try: {}\nexcept PermissionError: pass\nelse: raise SystemExit"
    assert passes("import socket", "assert socket.socketpair()", LIMITS).passed
    assert passes("import socket", refused.format("socket.socket()"), LIMITS).passed
    assert passes("import socket", refused.format("socket.socket(socket.AF_UNIX)"), LIMITS).passed
    inherited = "import subprocess, sys\nassert subprocess.run([sys.executable, '-c', 'import socket; socket.socket()']).returncode"
    assert passes(inherited, "", LIMITS).passed


def test_nothing_that_code_starts_is_left(tmp_path: Path) -> None:
    """Whatever session it is in, and although its parent is gone."""
    marker = f"{os.getpid()}.125"
    code = f"import subprocess\nsubprocess.Popen(['sleep', '{marker}'], start_new_session=True)"
    assert passes(code, "", LIMITS).passed
    assert not _runs(marker)
    assert passes(code + "\nimport time\ntime.sleep(100)", "", LIMITS).timed_out
    assert not _runs(marker)


def _runs(argument: str) -> bool:
    time.sleep(0.05)
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument.encode() in entry.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False
