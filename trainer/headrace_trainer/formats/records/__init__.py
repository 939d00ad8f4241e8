"""Records for the stages after pretraining: TRL's columns in JSON lines or Parquet -> typed records, bad ones counted.

``sources`` finds and reads them, ``shapes`` says what a row means, ``bad`` keeps the budget. Next: ``formats.chat``.
"""

from headrace_trainer.formats.records.bad import BadRecord, Place, Reason, Tally, Unusable
from headrace_trainer.formats.records.shapes import (
    KTO_SHAPES,
    PAIR_SHAPES,
    PROMPT_SHAPES,
    SFT_SHAPES,
    ChatRecord,
    CompletionRecord,
    PairRecord,
    PromptRecord,
    Record,
    Shape,
    TextRecord,
    sides,
)
from headrace_trainer.formats.records.sources import RecordSource, find_source, read_records

__all__ = [
    "KTO_SHAPES",
    "PAIR_SHAPES",
    "PROMPT_SHAPES",
    "SFT_SHAPES",
    "BadRecord",
    "ChatRecord",
    "CompletionRecord",
    "PairRecord",
    "Place",
    "PromptRecord",
    "Reason",
    "Record",
    "RecordSource",
    "Shape",
    "Tally",
    "TextRecord",
    "Unusable",
    "find_source",
    "read_records",
    "sides",
]
