"""The corpus stage: raw text in WARC, WET, JSONL, Parquet, HTML or plain files -> cleaned documents.

In order: language identification, the Gopher quality rules (arXiv 2112.11446, table A1), exact deduplication.
"""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from headrace_api.base import FieldError, Line, Matches, Spec, StoredUri, api_rules, rule
from headrace_api.stages.base import ArtifactKind, RunsAs, StageConfig


class Format(StrEnum):
    """How a source's files are read."""

    AUTO = "auto"
    WARC = "warc"
    WET = "wet"
    JSONL = "jsonl"
    PARQUET = "parquet"
    TEXT = "text"
    HTML = "html"


class Dedup(StrEnum):
    """Which duplicate documents are dropped."""

    EXACT = "exact"
    NONE = "none"


class Source(Spec):
    """One source of raw text."""

    uri: StoredUri
    """uri is a file, a folder or an s3:// prefix; a relative path is relative to the manifest."""
    format: Format = Format.AUTO
    """format is how the files are read; auto decides by name (.warc, .wet, .jsonl or .json, .parquet, .html; anything else is text; .gz, .bz2, .xz and .zst are decompressed)."""
    text_field: Line = Field("text", max_length=100)
    """textField is the column or key that holds the text of JSONL and Parquet records."""


class QualityRules(StrEnum):
    """Which family of rules decides whether text reads like prose."""

    GOPHER = "gopher"
    NONE = "none"


class Quality(Spec):
    """Rules for prose. A document that breaks one is dropped, and counted under that rule's name."""

    model_config = api_rules(
        rule("self.minWords <= self.maxWords", "minWords must be at most maxWords"),
        rule("self.minMeanWordLength <= self.maxMeanWordLength", "minMeanWordLength must be at most maxMeanWordLength"),
    )

    rules: QualityRules = QualityRules.GOPHER
    """rules is the rule family: gopher, with the bounds below, or none to keep every document."""
    min_words: int = Field(50, ge=0, le=10**9)
    """minWords is the smallest number of words in a document."""
    max_words: int = Field(100_000, ge=1, le=10**9)
    """maxWords is the largest number of words in a document."""
    min_mean_word_length: float = Field(3.0, ge=0)
    """minMeanWordLength is the smallest mean word length, in characters."""
    max_mean_word_length: float = Field(10.0, ge=0)
    """maxMeanWordLength is the largest mean word length, in characters."""
    max_symbol_to_word_ratio: float = Field(0.1, ge=0)
    """maxSymbolToWordRatio bounds the number of hash signs, and of ellipses, per word."""
    max_bullet_line_ratio: float = Field(0.9, ge=0, le=1)
    """maxBulletLineRatio is the largest fraction of lines that start with a bullet."""
    max_ellipsis_line_ratio: float = Field(0.3, ge=0, le=1)
    """maxEllipsisLineRatio is the largest fraction of lines that end with an ellipsis."""
    min_alphabetic_word_ratio: float = Field(0.8, ge=0, le=1)
    """minAlphabeticWordRatio is the smallest fraction of words with at least one letter."""
    min_stop_words: int = Field(2, ge=0, le=10**9)
    """minStopWords is the smallest number of stop words (the, be, to, of, and, that, have, with) in an English document."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_words > self.max_words:
            raise FieldError("minWords", self.min_words, f"must be at most maxWords, {self.max_words}")
        if self.min_mean_word_length > self.max_mean_word_length:
            most = self.max_mean_word_length
            raise FieldError(
                "minMeanWordLength", self.min_mean_word_length, f"must be at most maxMeanWordLength, {most}"
            )
        return self


Language = Annotated[str, Matches(r"^[a-z]{2}$", "write a two-letter ISO 639-1 code, such as en"), Field(max_length=2)]


class Corpus(StageConfig):
    """Read raw text; keep documents that are in a wanted language, read like prose and are not duplicates."""

    KIND = "corpus"
    GIVES = ArtifactKind.CORPUS
    RUNS_AS = RunsAs.TASKS

    sources: list[Source] = Field(min_length=1, max_length=64)
    """sources are the places to read raw text from."""
    languages: list[Language] = Field(default_factory=list, max_length=100)
    """languages are the ISO 639-1 codes of the languages to keep; an empty list keeps every language."""
    min_language_score: float = Field(0.65, ge=0, le=1)
    """minLanguageScore is the smallest probability of the identified language."""
    quality: Quality = Field(default_factory=Quality)
    """quality holds the rules for prose."""
    dedup: Dedup = Dedup.EXACT
    """dedup selects which duplicates are dropped: exact compares the normalized text."""
