"""Parse YAML into plain values as kubectl does, within bounds: any text ends quickly in values or in a clear error.

PyYAML only splits the text into events here. Its own constructor recurses with every nesting level, silently keeps the
last of two equal keys, and follows YAML 1.1, in which ``3e-4`` is text and ``12:30`` is 750, unlike in kubectl.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from headrace_api.base import FieldError

MAX_DEPTH = 64
MAX_NODES = 100_000
"""Limit on the number of values in a file, counting each use of an alias."""
_MOST_DIGITS = 40

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same events, ten times as fast

_BOOLEANS = {
    text: value
    for value, words in ((True, ("y", "yes", "true", "on")), (False, ("n", "no", "false", "off")))
    for word in words
    for text in (word, word.capitalize(), word.upper())
}
_NULLS = ("", "~", "null", "Null", "NULL")
_SPECIAL = {
    sign + text: float(sign + text[1:])
    for text in (".nan", ".NaN", ".NAN", ".inf", ".Inf", ".INF")
    for sign in ("", "+", "-")
    if sign == "" or text.lower() == ".inf"
}
_INTEGER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO]?[0-7]+|0|[1-9][0-9]*)")
_OCTAL = re.compile(r"[-+]?0[0-7]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_MERGE = "<<"


def read_documents(text: str) -> list[Any]:
    """The documents of a YAML file as plain Python values. Empty documents are omitted.

    Raises:
        FieldError: not YAML, a duplicate key, or too deep or too large; the field says where.
    """
    reader = _Reader()
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            reader.take(event)
    except (yaml.reader.ReaderError, yaml.MarkedYAMLError) as error:
        raise _syntax_error(error, text) from error
    return [document for document in reader.documents if document is not None]


def resolve(text: str) -> Any:
    """The value of an unquoted scalar, according to kubectl."""
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if text in _NULLS:
        return None
    if text in _SPECIAL:
        return _SPECIAL[text]
    digits = text.replace("_", "") if text[:1] in "+-0123456789" else text
    if _INTEGER.fullmatch(digits):
        return int(digits, 8 if _OCTAL.fullmatch(digits) else 0)
    if not _FLOAT.fullmatch(digits):
        return text
    number = float(digits)
    return number if math.isfinite(number) else text


@dataclass
class _Block:
    """A list or mapping that is still open."""

    value: Any
    anchor: str | None
    first_node: int
    key: str | None = None
    lines: dict[str, int] = field(default_factory=dict)
    merged: list[Any] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Anchored:
    value: Any
    num_nodes: int


class _Reader:
    """Builds values from events. Keeps an explicit stack, so that nesting never recurses."""

    def __init__(self) -> None:
        self.documents: list[Any] = []
        self._open: list[_Block] = []
        self._anchors: dict[str, _Anchored] = {}
        self._num_nodes = 0

    def take(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            self._anchors = {}
        elif isinstance(event, yaml.ScalarEvent):
            self._count(1, line)
            value = self._scalar(event, line)
            self._mark(event.anchor, value, num_nodes=1)
            self._put(value, line)
        elif isinstance(event, yaml.AliasEvent):
            self._put(self._alias(event.anchor or "", line), line)
        elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            self._begin(event, line)
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            block = self._open.pop()
            for source in block.merged:
                block.value.update({k: v for k, v in source.items() if k not in block.value})
            self._mark(block.anchor, block.value, num_nodes=self._num_nodes - block.first_node)
            self._put(block.value, line)

    def _begin(self, event: Any, line: int) -> None:
        if len(self._open) >= MAX_DEPTH:
            raise FieldError(f"line {line}", f"nested more than {MAX_DEPTH} deep", "nest less; is a bracket left open?")
        self._check_tag(event, line)
        value: Any = [] if isinstance(event, yaml.SequenceStartEvent) else {}
        self._open.append(_Block(value=value, anchor=event.anchor, first_node=self._num_nodes))
        self._count(1, line)

    def _count(self, nodes: int, line: int) -> None:
        self._num_nodes += nodes
        if self._num_nodes > MAX_NODES:
            raise FieldError(
                self._field(line), f"more than {MAX_NODES} values", "write fewer; aliases count each time they are used"
            )

    def _mark(self, anchor: str | None, value: Any, *, num_nodes: int) -> None:
        if anchor is not None:
            self._anchors[anchor] = _Anchored(value=value, num_nodes=num_nodes)

    def _put(self, value: Any, line: int) -> None:
        if not self._open:
            self.documents.append(value)
            return
        block = self._open[-1]
        if isinstance(block.value, list):
            block.value.append(value)
        elif block.key is None:
            block.key = self._key(value, line)
        else:
            self._set(block, block.key, value, line)
            block.key = None

    def _set(self, block: _Block, key: str, value: Any, line: int) -> None:
        if key != _MERGE:
            block.value[key] = value
            return
        sources = value if isinstance(value, list) else [value]
        if not all(isinstance(source, dict) for source in sources):
            raise FieldError(self._field(line), shown(value), "<< merges blocks; give it an alias of one")
        block.merged = sources

    def _key(self, value: Any, line: int) -> str:
        if isinstance(value, dict | list):
            raise FieldError(self._field(line), shown(value), "a key is one word; write name: value")
        key, block = value if isinstance(value, str) else _spelled(value), self._open[-1]
        if key in block.lines:
            raise FieldError(
                self._field(line, key), "duplicate key", f"already set on line {block.lines[key]}; remove one of them"
            )
        block.lines[key] = line
        return key

    def _scalar(self, event: Any, line: int) -> Any:
        self._check_tag(event, line)
        text: str = event.value
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise FieldError(
                self._field(line), shown(text), "contains half of a surrogate pair; write the character itself"
            )
        if event.style or event.tag is not None:  # quoted, a block of text, or tagged as text
            return text
        if len(text) > _MOST_DIGITS and (_INTEGER.fullmatch(text) or _FLOAT.fullmatch(text)):
            raise FieldError(self._field(line), f"a number of {len(text)} digits", f"write at most {_MOST_DIGITS}")
        return resolve(text)

    def _check_tag(self, event: Any, line: int) -> None:
        if event.tag not in (None, "!", "tag:yaml.org,2002:str"):
            raise FieldError(self._field(line), event.tag, "tags have no effect here; remove it")

    def _alias(self, anchor: str, line: int) -> Any:
        found = self._anchors.get(anchor)
        if found is None:
            raise FieldError(self._field(line), f"*{anchor}", f"no earlier block is marked &{anchor}")
        self._count(found.num_nodes, line)
        return found.value

    def _field(self, line: int, key: str | None = None) -> str:
        """The current position, such as ``line 7, spec.stages[1].name``."""
        parts: list[int | str] = []
        for block in self._open:
            if isinstance(block.value, list):
                parts.append(len(block.value))
            elif block.key is not None:
                parts.append(block.key)
        path = dotted([*parts, *([key] if key is not None else [])])
        return f"line {line}, {path}" if path else f"line {line}"


def _spelled(value: Any) -> str:
    """The text of a key that YAML reads as a number, a boolean or null."""
    return "null" if value is None else str(value).lower()


def dotted(parts: Sequence[int | str]) -> str:
    """``["spec", "stages", 1, "name"]`` as ``spec.stages[1].name``."""
    out = ""
    for part in parts:
        if isinstance(part, int):
            out += f"[{part}]"
        else:
            name = part if part.isprintable() and 0 < len(part) <= 60 else repr(part)[:60]
            out += f".{name}" if out else name
    return out


def shown(value: object) -> str:
    """A value in recognizable form, on one line of bounded length."""
    if isinstance(value, dict | list):
        return "a block" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return _spelled(value)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _syntax_error(error: yaml.reader.ReaderError | yaml.MarkedYAMLError, text: str) -> FieldError:
    if isinstance(error, yaml.reader.ReaderError):  # the text holds what YAML cannot: NUL and its like
        line = text.encode()[: error.position].count(b"\n") + 1  # libyaml counts bytes
        return FieldError(f"line {line}", "a control character", "YAML is text; save the file as UTF-8, without it")
    mark: Any = error.problem_mark  # never None: scanner and parser set it
    lines = text.splitlines()
    where = f"line {mark.line + 1}, column {mark.column + 1}"
    if mark.line < len(lines) and "\t" in lines[mark.line][: mark.column + 1]:
        return FieldError(where, "a tab", "YAML is indented with spaces; replace it")
    return FieldError(where, error.problem, "correct the YAML there")
