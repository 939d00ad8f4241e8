"""Phrases validation errors in our own words, so that pydantic's never reach users.

In: one of pydantic's error dicts, and the class it is about. Out: a line with field, value and remedy.
"""

import difflib
import functools
import re
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from headrace_api.base import FieldError
from headrace_api.plain_yaml import dotted, shown

Location = tuple[int | str, ...]


def describe(error: Any, root: type[BaseModel]) -> str:
    """One of pydantic's error dicts as a line: field, value, remedy."""
    location, kind = _below_unions(error["loc"]), error["type"]
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        field = ".".join(p for p in (dotted(location), cause.field) if p)
        return line(field, cause.value, cause.remedy)
    if kind == "extra_forbidden":
        return unknown(location, _fields_at(root, location[:-1]))
    if kind == "missing":
        return f"{dotted(location)}: missing; this field is required"
    # Of a time, pydantic's cause is text of its own.
    remedy = str(cause) if isinstance(cause, ValueError) else _remedy(kind, error, root, location)
    return line(dotted(location), error["input"], remedy)


def line(field: str, value: object, remedy: str) -> str:
    """A problem as one line."""
    return ": ".join(part for part in (field, shown(value) if value is not None else "", remedy) if part)


def unknown(location: Location, known: Sequence[str]) -> str:
    """The line about an unknown field."""
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known fields are {', '.join(known)}"
    return f"{dotted(location)}: unknown field; {hint}"


_REMEDIES: dict[str, str] = {
    "bool_type": "write true or false, without quotes",
    "int_type": "write a whole number, without quotes",
    "float_type": "write a number, without quotes",
    "list_type": "write a list",
    "dict_type": "write a block of names and values",
    "datetime_type": "write a time, such as 2026-01-31T12:00:00Z",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "write at least {min_length} character(s)",
    "string_too_long": "write at most {max_length} characters",
    "too_short": "list at least {min_length}",
    "too_long": "list at most {max_length}; there are {actual_length}",
}
"""pydantic's error type -> remedy, formatted with the error's context."""
UNKNOWN = "is not valid for this field; see `kubectl explain`"
"""For an error type without a phrase. Tests check that none reaches users."""
_TIMES = ("datetime_", "timezone_")


def _remedy(kind: str, error: Any, root: type[BaseModel], location: Location) -> str:
    if kind == "string_type":
        return _write_text(error["input"])
    if kind in ("enum", "literal_error"):
        return _choose(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    if kind == "model_type":
        return f"write a block with {', '.join(_fields_at(root, location))}"
    if kind in ("too_short", "too_long") and isinstance(error["input"], str):
        kind = f"string_{kind}"
    if kind.startswith(_TIMES):
        kind = "datetime_type"
    return _REMEDIES.get(kind, UNKNOWN).format(**error.get("ctx", {}))


def _choose(value: object, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.8)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(options)}"


def _write_text(value: object) -> str:
    if isinstance(value, bool):
        return "write text, in quotes: YAML reads yes, no, on, off, y and n as true or false"
    return "write text, in quotes"


def _below_unions(location: Location) -> Location:
    """The location in the manifest, without pydantic's ``[key]`` for keys of a map."""
    return tuple(part for part in location if part != "[key]")


def _fields_at(root: type[BaseModel], location: Location) -> list[str]:
    """The field names, as in manifests, of the block at ``location``."""
    model: type[BaseModel] | None = root
    for part in location:
        if isinstance(part, str) and model is not None:
            model = blocks_in(model).get(part)
    return [] if model is None else list(blocks_in(model))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model class in ``X | None``, ``list[X]`` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, Annotated, list):
        return next((m for a in get_args(annotation) if (m := _model_in(a)) is not None), None)
    return None


@functools.cache
def blocks_in(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Field name as written -> the class of its block or blocks; None for plain values."""
    return {f.alias or n: _model_in(f.annotation) for n, f in model.model_fields.items()}
