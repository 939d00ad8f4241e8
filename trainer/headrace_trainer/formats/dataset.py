"""The ``data`` block of a stage -> units to train on, units to measure, and a report of what became of the records.

In: the block, the shapes that the stage takes and an ``Encoder``. Out: a ``Dataset`` on this machine's disk. The order is
fixed: sources as listed, files by name, records as they stand.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from headrace_api.run import Storage
from headrace_api.stages.data import Data, RecordFormat, Records, ValidationData
from headrace_trainer import board
from headrace_trainer.errors import Stopped, UserError
from headrace_trainer.formats.chat import Encoder
from headrace_trainer.formats.files import StoredFile
from headrace_trainer.formats.packs import Share, unit_length
from headrace_trainer.formats.records import (
    BadRecord,
    CompletionRecord,
    PromptRecord,
    Record,
    RecordSource,
    Shape,
    Tally,
    find_source,
    read_records,
    sides,
)
from headrace_trainer.formats.units import Units, UnitWriter

RECORDS_FILE = "records.jsonl"
"""The file of a records artifact that is trained on."""
_NOTE = "dataset.json"
_ASK_EVERY = 1000
"""Records between two looks at whether to stop."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Records as units of tokens."""

    train: Units
    shares: tuple[Share, ...]
    """Which units of ``train`` are of which source, and how often an epoch takes them."""
    validation: Units | None
    report: dict[str, Any]
    """What was read, left out, cut and kept, by source."""

    @property
    def digest(self) -> str:
        """Of what is trained on, and how often."""
        return f"{self.train.digest} {[share.weight for share in self.shares]}"

    def save(self, folder: Path) -> None:
        """Complete the folder, so that other processes can open it."""
        note = {"shares": [dataclasses.asdict(share) for share in self.shares], "report": self.report}
        (folder / _NOTE).write_bytes(orjson.dumps(note | {"validation": self.validation is not None}))

    @classmethod
    def open(cls, folder: Path) -> "Dataset":
        """What ``save`` completed."""
        note = orjson.loads((folder / _NOTE).read_bytes())
        return cls(
            train=Units(folder / "train"),
            shares=tuple(Share(**share) for share in note["shares"]),
            validation=Units(folder / "validation") if note["validation"] else None,
            report=note["report"],
        )


@dataclass(kw_only=True)
class _Kept:
    """What became of the good records of one source."""

    train: int = 0
    validation: int = 0
    truncated: int = 0
    dropped: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    first_dropped: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class _Builder:
    """Reads one source after the other into two writers."""

    encoder: Encoder
    storage: Storage
    scratch: Path
    allowed: Collection[Shape]
    max_bad_fraction: float
    stop_requested: Callable[[], bool]
    note: Callable[[Record], bytes]
    sources: list[dict[str, Any]] = field(default_factory=list)

    def read(self, source: RecordSource, train: UnitWriter, validation: UnitWriter, *, held_back: float) -> _Kept:
        """Every record of a source; the part ``held_back`` of them goes to ``validation``.

        Raises:
            UserError: too many are bad, or none is left.
            Stopped: on request.
        """
        tally, kept = Tally(name=source.name), _Kept()
        records = read_records(source, self.storage, allowed=self.allowed, scratch=self.scratch)
        if Shape.LABEL in self.allowed:
            records = _apart(records)
        for encoded in tally.good_ones(self.encoder.encode(records)):
            if tally.good % _ASK_EVERY == 0:
                self._beat()
            kept.truncated += encoded.truncated
            if encoded.unit is None:
                kept.dropped += 1
                kept.first_dropped += [str(encoded.record.place)] * (len(kept.first_dropped) < 5)
                continue
            kept.tokens += unit_length(encoded.unit)
            kept.trained_tokens += sum(document.num_trained for document in encoded.unit)
            note = self.note(encoded.record)
            if held_back and is_held_back(encoded.record, fraction=held_back):
                validation.add(encoded.unit, note)
                kept.validation += 1
            else:
                train.add(encoded.unit, note)
                kept.train += 1
        tally.check(max_bad_fraction=self.max_bad_fraction)
        _check_something_left(source.name, tally, kept)
        self.sources.append(_as_json(source, tally, kept))
        return kept

    def _beat(self) -> None:
        board.beat()
        if self.stop_requested():
            raise Stopped("asked to stop while the records were read; they will be read again from the start")


def other_columns(record: Record) -> bytes:
    """What is known of a right answer to a prompt: the record's other columns, as JSON."""
    return orjson.dumps(record.others, default=str) if isinstance(record, PromptRecord) else b""


def load_dataset(
    data: Records,
    *,
    name: str,
    allowed: Collection[Shape],
    encoder: Encoder,
    storage: Storage,
    folder: Path,
    earlier: Path | None = None,
    note: Callable[[Record], bytes] = other_columns,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Dataset:
    """Read, render, tokenize and write every record.

    Args:
        data: the block.
        name: what the manifest calls it, as ``sft.data``.
        allowed: the shapes that the stage takes.
        encoder: makes units of records.
        storage: names the S3 endpoint and region.
        folder: where the units are written, and files from S3 are put while they are read.
        earlier: an artifact of records that an earlier stage wrote, which come after those of ``data``.
        note: what is kept of a record beside its tokens.
        stop_requested: whether the stage has been asked to stop.

    Raises:
        UserError: a source is missing, damaged or has too many bad records; or nothing is left to train on or to measure.
        Stopped: on request.
    """
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    builder = _Builder(
        encoder=encoder,
        storage=storage,
        scratch=scratch,
        allowed=allowed,
        max_bad_fraction=data.max_bad_fraction,
        stop_requested=stop_requested,
        note=note,
    )
    held_out = data.validation if isinstance(data, Data) else None
    held_back = held_out.fraction or 0.0 if held_out is not None else 0.0
    shares: list[Share] = []
    with UnitWriter(folder / "train") as train, UnitWriter(folder / "validation") as validation:
        for found, weight in _sources(data, storage, name=name, earlier=earlier):
            first = len(train)
            builder.read(found, train, validation, held_back=held_back)
            shares.append(Share(first=first, count=len(train) - first, weight=weight))
        if held_out is not None and held_out.uri is not None:
            found = find_source(held_out.uri, storage, field=f"{name}.validation.uri", format=held_out.format)
            builder.read(found, train, validation, held_back=1.0)
    return _dataset(held_out, folder, tuple(shares), name=name, sources=builder.sources)


def _sources(
    data: Records, storage: Storage, *, name: str, earlier: Path | None
) -> Iterator[tuple[RecordSource, float]]:
    """Where records are, and how often an epoch takes each."""
    for i, source in enumerate(data.sources):
        field = f"{name}.sources[{i}].uri"
        yield find_source(source.uri, storage, field=field, format=source.format), source.weight
    if earlier is not None:
        assert isinstance(data, Data), "only these take records of an earlier stage"
        file = StoredFile(root=str(earlier), key=RECORDS_FILE, bytes=(earlier / RECORDS_FILE).stat().st_size)
        field = f"{name.partition('.')[0]}.from.records"
        files = ((file, RecordFormat.JSONL),)
        yield RecordSource(name=field, files=files, left_out=()), data.records_weight or 1.0


def _apart(records: Iterable[Record | BadRecord]) -> Iterator[Record | BadRecord]:
    """The records, a pair as two of them."""
    for record in records:
        yield from (record,) if isinstance(record, BadRecord) else sides(record)


def is_held_back(record: Record, *, fraction: float) -> bool:
    """Whether a record is kept for validation: decided by its content alone, so that copies are on the same side.

    Of a labelled answer by its prompt: other answers to that prompt, such as the other side of its pair, tell too much.
    """
    content = {name: value for name, value in vars(record).items() if name != "place"}
    if isinstance(record, CompletionRecord) and record.label is not None:
        content = {"prompt": record.prompt, "tools": record.tools}
    digest = hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS, default=str)).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 < fraction


def _check_something_left(name: str, tally: Tally, kept: _Kept) -> None:
    if kept.dropped == tally.good:
        raise UserError(
            f"{name}: none of {tally.good:,} records has anything to train on within sequenceLength; "
            f"raise sequenceLength; the first is {kept.first_dropped[0]}"
        )


def _dataset(
    held_out: ValidationData | None,
    folder: Path,
    shares: tuple[Share, ...],
    *,
    name: str,
    sources: list[dict[str, Any]],
) -> Dataset:
    train, validation = Units(folder / "train"), Units(folder / "validation")
    if len(train) == 0:
        raise UserError(f"{name}.validation.fraction: holds every record back; lower it, or add records")
    if held_out is not None and len(validation) == 0:
        total = len(train)
        raise UserError(
            f"{name}.validation.fraction: {held_out.fraction}: holds none of {total:,} records back; raise it"
        )
    measured = validation if held_out is not None else None
    return Dataset(train=train, shares=shares, validation=measured, report={"sources": sources} | _lengths(train))


def _lengths(units: Units) -> dict[str, Any]:
    """How long the units are, in tokens."""
    points = np.quantile(units.lengths, [0.5, 0.9, 1.0], method="lower").tolist()
    return {"unitTokens": dict(zip(("median", "p90", "max"), points, strict=True)), "trainedTokens": units.num_trained}


def _as_json(source: RecordSource, tally: Tally, kept: _Kept) -> dict[str, Any]:
    counts = {
        "train": kept.train,
        "validation": kept.validation,
        "truncated": kept.truncated,
        "dropped": kept.dropped,
        "firstDropped": kept.first_dropped,
        "tokens": kept.tokens,
        "trainedTokens": kept.trained_tokens,
    }
    empty = [file.address for file, _ in source.files if file.bytes == 0]
    return tally.as_json() | counts | {"emptyFiles": empty, "filesLeftOut": list(source.left_out)}
