"""The ``data`` block of the stages after pretraining: where the records are, and how many of them may be bad.

Records are as TRL has them: ``text``, ``messages``, ``prompt`` and ``completion``, ``chosen`` and ``rejected``, with a
``label``. Which of these a stage takes is its own affair; the trainer's ``formats.records`` reads them.
"""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from headrace_api.base import FieldError, Spec, StoredUri, api_rules, rule
from headrace_api.storage import cel_is_absolute


class RecordFormat(StrEnum):
    """How a source's files are read."""

    JSONL = "jsonl"
    PARQUET = "parquet"


class DataSource(Spec):
    """One place where records are."""

    uri: StoredUri
    """uri is a file, a folder, an s3:// prefix, or a pattern with *, ? and [...]; ** goes through folders. A relative path is relative to the manifest."""
    weight: float = Field(1.0, gt=0, le=100)
    """weight is how often an epoch takes each record: 2 takes it twice, 0.5 takes half of the records, the other half in the next epoch."""
    format: RecordFormat | None = None
    """format is jsonl or parquet; if unset, the files' names say it (.jsonl, .ndjson, .json or .parquet; .gz, .bz2, .xz and .zst are unpacked), and files with other names are left out of a folder."""


_ONE_ORIGIN = "set either uri, to read held-out records, or fraction, to hold some of the sources' back; not both"


class ValidationData(Spec):
    """Records that are measured and never trained on."""

    model_config = api_rules(
        rule("has(self.uri) != has(self.fraction)", _ONE_ORIGIN),
        rule("has(self.uri) || !has(self.format)", "format is of the files that uri names; set uri, or leave it out"),
    )

    uri: StoredUri | None = None
    """uri is where held-out records are, as a source's uri."""
    format: RecordFormat | None = None
    """format is jsonl or parquet, as a source's format."""
    fraction: float | None = Field(None, gt=0, le=0.5)
    """fraction is the part of each source's records that is held back; which ones is decided by their content, so copies stay together."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.uri is None) == (self.fraction is None):
            raise FieldError("uri", self.uri, _ONE_ORIGIN)
        if self.uri is None and self.format is not None:
            raise FieldError("format", self.format.value, "is of the files that uri names; set uri, or leave it out")
        return self


class Records(Spec):
    """The records that a stage reads."""

    sources: list[DataSource] = Field(min_length=1, max_length=64)
    """sources are the places where the records are; each has records of one shape."""
    max_bad_fraction: float = Field(0.001, ge=0, le=1)
    """maxBadFraction bounds the part of each source's records that cannot be used: not JSON, a missing or empty field, two equal sides, turns that the chat template refuses. Below it they are left out and counted; above it the stage fails and names the first."""


class Data(Records):
    """The records that a stage is trained on, and those that it is measured on."""

    sources: list[DataSource] = Field(default_factory=list, max_length=64)
    """sources are the places where the records are; each has records of one shape. There may be none where from.records names a stage that wrote records."""
    records_weight: float | None = Field(None, gt=0, le=100)
    """recordsWeight is how often an epoch takes each record of from.records, as a source's weight; 1 if unset."""
    validation: ValidationData | None = None
    """validation holds records that are measured and never trained on; none if unset."""


def cel_sources_absolute(block: str) -> str:
    """CEL that holds where the sources of the ``data`` block at ``block`` mean the same in every working directory."""
    return f"!has({block}.sources) || {block}.sources.all(x, {cel_is_absolute('x.uri')})"


def cel_validation_absolute(block: str) -> str:
    """The same of the held-out records."""
    held_out = f"{block}.validation.uri"
    return f"!has({block}.validation) || !has({held_out}) || {cel_is_absolute(held_out)}"
