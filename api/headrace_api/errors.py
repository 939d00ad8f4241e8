"""Validation errors as an interface: every line names the field, the value and the remedy.

In: pydantic's ``ValidationError``, or YAML that is not a manifest. Out: ``ManifestError`` with one line a problem.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from headrace_api.base import FieldError
from headrace_api.run import TrainingRun

Location = tuple[int | str, ...]


class ManifestError(ValueError):
    """A manifest that cannot be run.

    Attributes:
        problems: one line each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def load_run(path: Path) -> TrainingRun:
    """Read a TrainingRun from a YAML file.

    Raises:
        ManifestError: the file is missing, is not YAML, or does not describe a valid run.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ManifestError([f"{path}: no such file; check the path"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError([f"{path}: cannot be read as UTF-8 text: {error}"]) from error
    try:
        documents = [d for d in yaml.safe_load_all(text) if d is not None]
    except yaml.YAMLError as error:
        raise ManifestError([f"{path}: not valid YAML: {error}"]) from error
    runs = [d for d in documents if isinstance(d, dict) and d.get("kind", "TrainingRun") == "TrainingRun"]
    if len(runs) != 1:
        raise ManifestError([f"{path}: holds {len(runs)} TrainingRun objects; it must hold exactly one"])
    return parse_run(runs[0])


def parse_run(value: dict[str, Any]) -> TrainingRun:
    """Validate a TrainingRun.

    Raises:
        ManifestError: with one line for each problem.
    """
    try:
        return TrainingRun.model_validate(value)
    except ValidationError as error:
        raise ManifestError([describe(e, TrainingRun) for e in error.errors()]) from error


def describe(error: Any, root: type[BaseModel]) -> str:
    """One line for one of pydantic's error dicts: field, value, remedy."""
    location: Location = error["loc"]
    kind, cause = error["type"], error.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        field = ".".join(p for p in (_dotted(location), cause.field) if p)
        return f"{field}: {_shown(cause.value)}: {cause.remedy}"
    if kind == "extra_forbidden":
        known = _fields_at(root, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known fields are {', '.join(known)}"
        return f"{_dotted(location)}: unknown field; {hint}"
    if kind == "missing":
        return f"{_dotted(location)}: missing; this field is required"
    message = str(cause) if cause is not None else str(error["msg"])
    return f"{_dotted(location)}: {_shown(error['input'])}: {message}"


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, dict | list) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _dotted(location: Location) -> str:
    out = ""
    for part in location:
        if isinstance(part, int):
            out += f"[{part}]"
        elif part != "[key]":
            out += f".{part}" if out else part
    return out


def _fields_at(root: type[BaseModel], location: Location) -> list[str]:
    """The field names, as written in manifests, of the block at ``location``."""
    model: type[BaseModel] | None = root
    for part in location:
        if isinstance(part, int) or model is None:
            continue
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        model = _model_in(field.annotation) if field is not None else None
    return [] if model is None else [f.alias or n for n, f in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model class inside ``X | None``, ``list[X]`` and their like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, Annotated, list):
        return next((m for a in get_args(annotation) if (m := _model_in(a)) is not None), None)
    return None
