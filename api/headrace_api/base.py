"""The base class of every spec, and the scalar types that people write: ``140G``, ``30m``, ``s3://...``.

In: YAML values. Out: numbers and strings with one meaning. Errors name the field, the value and the remedy
(``errors.py`` prints them).
"""

import math
import re
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel


class Part(Enum):
    """What a field has to do with a stage's result, put into the field's ``Annotated``; a field without one decides it."""

    EXECUTION = "execution"
    """How the work is done: the result is the same with another value, and what is done stays done."""
    EXTENT = "extent"
    """How far the work goes: the result is another one with another value, but what was done so far fits it."""


class Spec(BaseModel):
    """A block of a manifest: camelCase outside, snake_case inside, unknown fields refused, values frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def dump(self) -> dict[str, Any]:
        """The block as plain JSON values with the manifest's field names; unset optional fields are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def dump_without(self, parts: Collection[Part]) -> dict[str, Any]:
        """The block as plain JSON values, without the fields that are marked as one of ``parts``."""
        dumped, fields = self.dump(), type(self).model_fields.items()
        return {
            alias: _dump_without(getattr(self, name), dumped[alias], parts)
            for name, field in fields
            if (alias := field.alias or name) in dumped
            and not any(isinstance(mark, Part) and mark in parts for mark in field.metadata)
        }


def _dump_without(value: object, dumped: Any, parts: Collection[Part]) -> Any:
    if isinstance(value, Spec):
        return value.dump_without(parts)
    if isinstance(value, list):
        return [_dump_without(v, d, parts) for v, d in zip(value, dumped, strict=True)]
    return dumped


class FieldError(ValueError):
    """A bad value that people wrote: which field (dotted, below the block that raises), the value, and what to do."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}: {value!r}: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy


_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_QUANTITY = re.compile(r"^(\d+(?:\.\d+)?)(Ki|Mi|Gi|Ti|[kMGBT]?)$")
_DURATION = re.compile(r"^(\d+(?:\.\d+)?)(ms|s|m|h|d)$")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_quantity(value: object) -> object:
    """``140G`` -> 140_000_000_000, ``64Mi`` -> 67_108_864; numbers pass through."""
    if not isinstance(value, str):
        return value
    match = _QUANTITY.match(value.strip())
    if match is None:
        raise ValueError("not a quantity; write a number with an optional suffix k, M, G, T, Ki, Mi or Gi, as 140G")
    number, suffix = match.groups()
    scaled = float(number) * {**_DECIMAL, **_BINARY}[suffix]
    if scaled != int(scaled):
        raise ValueError("not a whole number after its suffix is applied")
    return int(scaled)


def parse_duration(value: str) -> float:
    """Seconds in ``30m``, ``120s``, ``1.5h``.

    Raises:
        ValueError: the text has no number with a unit of ms, s, m, h or d.
    """
    match = _DURATION.match(value.strip())
    if match is None:
        raise ValueError("not a duration; write a number with a unit of ms, s, m, h or d, as 30m")
    return float(match.group(1)) * _SECONDS[match.group(2)]


def _check_cadence(value: object) -> object:
    if isinstance(value, str) and value.isdigit():
        return int(value)
    if isinstance(value, str):
        parse_duration(value)
    elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("write a number of steps, as 100, or a duration, as 30m")
    return value


Quantity = Annotated[
    int,
    BeforeValidator(parse_quantity),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": _QUANTITY.pattern.replace("?:", "")}),
]
"""A count that may be written with a suffix."""

Cadence = Annotated[
    int | str,
    BeforeValidator(_check_cadence),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": r"^[0-9]+(\.[0-9]+)?(ms|s|m|h|d)?$"}),
]
"""Every so many steps (a number) or every so much time (``30m``)."""


def _is_finite(value: object) -> bool:
    try:
        return math.isfinite(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def _finite_or_none(value: object) -> object:
    return value if _is_finite(value) else None


def _only_finite(value: object) -> object:
    return {k: v for k, v in value.items() if _is_finite(v)} if isinstance(value, Mapping) else value


Figure = Annotated[float | None, BeforeValidator(_finite_or_none)]
"""A measured number. One that is not finite is as good as none: JSON cannot hold it, and arithmetic trips over it."""

Figures = Annotated[dict[str, float], BeforeValidator(_only_finite)]
"""Measured numbers by name; those that are not finite are left out, and the others still read."""

Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40)]
"""A name that may become part of a Kubernetes object's name."""

Uri = Annotated[str, Field(min_length=1, max_length=1024)]
"""An ``s3://bucket/key`` address, a ``file://`` address or a path."""
