"""Clean a few files: keep the documents that pass the filters, with digests for deduplication.

In: a ``Unit`` of files. Out: a part file with a line per document (digest, characters, JSON), and the funnel so far.
Units are independent, so they run in separate processes. Next: ``stage`` merges the parts in order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace_api.run import Storage
from headrace_api.stages.corpus import Corpus
from headrace_trainer.formats.documents import Document, encode_document
from headrace_trainer.formats.files import local_copy
from headrace_trainer.stages.corpus.dedup import DIGEST_BYTES, text_digest
from headrace_trainer.stages.corpus.funnel import Funnel
from headrace_trainer.stages.corpus.language import identify
from headrace_trainer.stages.corpus.quality import QualityJudge
from headrace_trainer.stages.corpus.readers import read_records
from headrace_trainer.stages.corpus.sources import SourceFile

_UNIT_BYTES = 4 << 20
_LENGTH_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Consecutive files of one source, read by one process."""

    index: int
    source: int
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """The result of cleaning a unit."""

    unit: Unit
    part: Path
    funnel: Funnel


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A document that passed every filter except deduplication."""

    digest: bytes
    characters: int
    line: bytes
    """The document as JSON."""


def units_of(files: Sequence[SourceFile]) -> list[Unit]:
    """Group files into units of about 4 MiB; a larger file is its own unit."""
    groups: list[list[SourceFile]] = []
    for file in files:
        fits = groups and groups[-1][0].source == file.source
        if not fits or sum(f.bytes for f in groups[-1]) + file.bytes > _UNIT_BYTES:
            groups.append([])
        groups[-1].append(file)
    return [Unit(index=i, source=group[0].source, files=tuple(group)) for i, group in enumerate(groups)]


@dataclass(frozen=True, kw_only=True)
class Cleaner:
    """Cleans units by a manifest's rules."""

    config: Corpus
    storage: Storage
    scratch: Path

    def __call__(self, unit: Unit) -> Cleaned:
        """Read, filter and write one unit.

        Raises:
            UserError: a file cannot be read.
        """
        judge, funnel = QualityJudge(self.config.quality), Funnel()
        path = self.scratch / f"part-{unit.index:06d}"
        with path.open("wb") as part:
            for file in unit.files:
                for candidate in self._candidates(file, judge, funnel):
                    part.write(_pack(candidate))
        return Cleaned(unit=unit, part=path, funnel=funnel)

    def _candidates(self, file: SourceFile, judge: QualityJudge, funnel: Funnel) -> Iterator[Candidate]:
        source = self.config.sources[file.source].uri
        with local_copy(file, self.storage, scratch=self.scratch) as path:
            for record in read_records(path, file):
                text = record.text.strip()
                funnel.read.add(len(text))
                language, reason = self._judge(text, judge)
                if reason is not None:
                    funnel.drop(reason, len(text))
                    continue
                document = Document(
                    id=f"{file.key}#{record.number}", text=text, source=source, language=language, url=record.url
                )
                yield Candidate(digest=text_digest(text), characters=len(text), line=encode_document(document))

    def _judge(self, text: str, judge: QualityJudge) -> tuple[str, str | None]:
        """The language, and the reason to drop the text, if any."""
        if not text:
            return "", "noText"
        language, probability = identify(text)
        if probability < self.config.min_language_score:
            return language, "minLanguageScore"
        if self.config.languages and language not in self.config.languages:
            return language, "languages"
        return language, judge.broken_rule(text, language=language)


def _pack(candidate: Candidate) -> bytes:
    header = candidate.digest + candidate.characters.to_bytes(_LENGTH_BYTES, "big")
    return header.hex().encode() + candidate.line + b"\n"


def read_part(path: Path) -> Iterator[Candidate]:
    """Read what a ``Cleaner`` wrote."""
    header_characters = 2 * (DIGEST_BYTES + _LENGTH_BYTES)
    with path.open("rb") as lines:
        for line in lines:
            header = bytes.fromhex(line[:header_characters].decode())
            yield Candidate(
                digest=header[:DIGEST_BYTES],
                characters=int.from_bytes(header[DIGEST_BYTES:], "big"),
                line=line[header_characters:-1],
            )
