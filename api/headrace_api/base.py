"""The base class of every spec, and the scalar types of manifests: ``140G``, ``30m``, ``s3://...``.

In: YAML values. Out: numbers and strings with one meaning. Each type states its rules twice, for this process and for
the API server (patterns, and CEL where a pattern is not enough). Each error states the remedy; ``errors.py`` prints it.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, core_schema

JsonSchema = dict[str, Any]


class Part(Enum):
    """How a field affects a stage's result; set in its ``Annotated``. An unmarked field determines the result."""

    EXECUTION = "execution"
    """How the work is done. A change does not affect the result, so finished work stays valid."""
    EXTENT = "extent"
    """How far the work goes. A change affects the result, but work done so far stays valid."""


class Spec(BaseModel):
    """A block of a manifest: camelCase outside, snake_case inside; unknown fields are rejected; immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def dump(self) -> dict[str, Any]:
        """The block as JSON values under the manifest's field names, without unset optional fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def dump_without(self, parts: Collection[Part]) -> dict[str, Any]:
        """The block as JSON values, without fields marked as one of ``parts``."""
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
    """An invalid value in a manifest: the field (dotted, relative to the block that raises), the value, the remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}: {value!r}: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy


def rule(cel: str, message: str) -> JsonSchema:
    """A CEL rule and the API server's error message for it."""
    return {"rule": cel, "message": message}


def api_rules(*rules: JsonSchema) -> ConfigDict:
    """``model_config`` of a block with CEL rules: ``model_config = api_rules(rule(...))``."""
    return ConfigDict(json_schema_extra={"x-kubernetes-validations": list(rules)})


@dataclass(frozen=True)
class Matches:
    """Text that matches a pattern as a whole. The pattern must mean the same in Python and in Go's RE2."""

    pattern: str
    remedy: str

    def check(self, value: str) -> str:
        if re.fullmatch(self.pattern, value) is None:
            raise ValueError(self.remedy)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        return {**handler(schema), "pattern": self.pattern}


_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_SUFFIXES |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_QUANTITY = (
    # At most as many decimals as the suffix turns into a whole number.
    r"^[0-9]{1,15}(|[kMGBT]|[KMGT]i|\.[0-9]{1,3}k|\.[0-9]{1,6}M|\.[0-9]{1,9}[GB]|\.[0-9]{1,12}T"
    r"|\.(5|25|75|125|375|625|875)[KMGT]i)$"
)
_QUANTITY_LENGTH = 30
_QUANTITY_PARTS = re.compile(r"([0-9]{1,15})(\.[0-9]+)?([KMGT]i|[kMGBT]?)")
_DURATION = r"^[0-9]{1,9}(\.[0-9]{1,3})?(ms|s|m|h|d)$"
_DURATION_PARTS = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(ms|s|m|h|d)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_STEPS = r"^[0-9]{1,9}$"
_MOST_STEPS = 999_999_999


def parse_quantity(value: object) -> object:
    """``140G`` -> 140_000_000_000, ``64Mi`` -> 67_108_864. Anything but text passes through."""
    if not isinstance(value, str):
        return value
    parts = _QUANTITY_PARTS.fullmatch(value)
    if parts is None:
        raise ValueError(
            "not a quantity; write a number with an optional suffix k, M, G, T, Ki, Mi or Gi, such as 140G"
        )
    if re.fullmatch(_QUANTITY, value) is None:
        raise ValueError("not a whole number once its suffix is applied; write fewer decimals, or a smaller suffix")
    whole, decimals, suffix = parts.groups()
    return int(Decimal(whole + (decimals or "")) * _SUFFIXES[suffix])


def parse_duration(value: str) -> float:
    """Seconds in ``30m``, ``120s``, ``1.5h``.

    Raises:
        ValueError: not a number with a unit of ms, s, m, h or d.
    """
    parts = _DURATION_PARTS.fullmatch(value)
    if parts is None:
        raise ValueError("not a duration; write a number with a unit of ms, s, m, h or d, such as 30m")
    return float(parts[1]) * _SECONDS[parts[2]]


def _check_cadence(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(_STEPS, value):
        if parse_duration(value) <= 0:
            raise ValueError("must be above 0; write a number of steps, such as 100, or a duration, such as 30m")
        return value
    steps = int(value) if isinstance(value, str) else value
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= _MOST_STEPS:
        raise ValueError(f"write a number of steps from 1 to {_MOST_STEPS}, such as 100, or a duration, such as 30m")
    return steps


class _IntOrString:
    """Schema of a whole number with an optional suffix. ``crd.py`` turns its bounds into a CEL rule."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        bounds = {k: v for k, v in handler(schema).items() if k in ("minimum", "maximum")}
        text = {"pattern": _QUANTITY, "maxLength": _QUANTITY_LENGTH}
        return {"x-kubernetes-int-or-string": True, **text, **bounds}


Quantity = Annotated[int, BeforeValidator(parse_quantity), _IntOrString()]
"""A count, with an optional suffix."""


MOST = 10**15
"""The upper bound of any count: doubles up to here still represent every integer."""


def cel_number(field: str) -> str:
    """A ``Quantity`` as a double in CEL, with an error below one half. Kubernetes does not know the suffix B."""
    text = f"quantity({field}.replace('B', 'G')).asApproximateFloat()"
    return f"(type({field}) == int ? double({field}) : {text})"


_CADENCE_RULE = rule(
    f"type(self) == int ? self >= 1 && self <= {_MOST_STEPS} : self.matches('[1-9]')",
    f"must be above 0: a number of steps up to {_MOST_STEPS}, such as 100, or a duration, such as 30m",
)

Cadence = Annotated[
    int | str,
    BeforeValidator(_check_cadence),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "pattern": f"{_STEPS}|{_DURATION}",
            "maxLength": _QUANTITY_LENGTH,
            "x-kubernetes-validations": [_CADENCE_RULE],
        }
    ),
]
"""An interval: a number of steps, or a duration (``30m``)."""


def _check_duration(value: object) -> object:
    if not isinstance(value, str) or parse_duration(value) <= 0:
        raise ValueError("must be above 0; write a number with a unit of ms, s, m, h or d, such as 30m")
    return value


Duration = Annotated[
    str,
    BeforeValidator(_check_duration),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": _DURATION,
            "maxLength": _QUANTITY_LENGTH,
            "x-kubernetes-validations": [rule("self.matches('[1-9]')", "must be above 0, such as 30m")],
        }
    ),
]
"""A positive duration, such as ``30m``."""


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
"""A measured number; a non-finite one counts as unset, since JSON cannot represent it."""

Figures = Annotated[dict[str, float], BeforeValidator(_only_finite)]
"""Measured numbers by name. Non-finite ones are dropped."""

Name = Annotated[
    str,
    Field(max_length=40),
    Matches(
        r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        "write lower-case letters, digits and hyphens, starting with a letter and ending with a letter or digit",
    ),
]
"""A name that can be part of a Kubernetes object's name."""

ObjectName = Annotated[
    str,
    Field(max_length=253),
    Matches(
        r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
        "write the object's name: lower-case letters, digits, hyphens and dots",
    ),
]
"""The name of an existing Kubernetes object."""

Line = Annotated[
    str,
    Field(min_length=1),
    Matches(r"^[^\x00-\x1f\x7f]*$", "write one line, without tabs, line breaks and other control characters"),
]
"""A single line of text."""

Uri = Annotated[str, Field(min_length=1, max_length=1024)]
"""An ``s3://bucket/key`` URI, a ``file://`` URI or a path."""

_BUCKET = r"^s3://\w[\w.-]{1,62}(/|$)"
_SCHEMES = "only S3 and directories can be read: write s3://bucket/prefix, file:///folder or a path"


def _check_scheme(uri: str) -> str:
    if "://" in uri and not uri.startswith("file:///") and re.match(_BUCKET, uri, re.ASCII) is None:
        raise ValueError(_SCHEMES)
    return uri


StoredUri = Annotated[
    Line,
    Field(
        max_length=1024,
        json_schema_extra={
            "x-kubernetes-validations": [
                rule(
                    f"!self.contains('://') || self.startsWith('file:///') || self.matches(r'{_BUCKET}')",
                    _SCHEMES,
                )
            ]
        },
    ),
    AfterValidator(_check_scheme),
]
"""A ``Uri`` in a manifest, of a scheme that ``headrace_trainer.storage`` can open."""
