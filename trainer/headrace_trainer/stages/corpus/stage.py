"""The corpus stage: find files, clean them in parallel, merge and deduplicate in order, report.

In: a ``StageContext`` with a ``Corpus`` block. Out: ``documents-*.jsonl.gz`` and ``report.json`` in ``ctx.output``. The
result does not depend on the number of processes.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from headrace_api.stages.corpus import Corpus, Dedup
from headrace_trainer.errors import Stopped, UserError
from headrace_trainer.formats.documents import REPORT_FILE, DocumentWriter
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.corpus.clean import Cleaned, Cleaner, read_part, units_of
from headrace_trainer.stages.corpus.dedup import SeenTexts
from headrace_trainer.stages.corpus.funnel import Funnel, render_table, total_of
from headrace_trainer.stages.corpus.language import known_languages
from headrace_trainer.stages.corpus.parallel import available_cpus, map_in_order
from headrace_trainer.stages.corpus.sources import SourceFile, find_files

# Below this size, starting processes takes longer than it saves.
_PARALLEL_BYTES = 4 << 20


def run_corpus(ctx: StageContext) -> dict[str, float]:
    """Clean the sources.

    Returns:
        ``documentsIn``, ``documentsOut``, ``charactersOut``, ``duplicates``.

    Raises:
        UserError: a source is missing or damaged, or no document is left.
    """
    config = ctx.config
    assert isinstance(config, Corpus)
    _check_languages(config)
    files = find_files(config.sources, ctx.resolved.storage)
    funnels = [Funnel() for _ in config.sources]
    _merge(ctx, config, _clean(ctx, config, files), funnels, num_files=len(files))
    total = total_of(funnels)
    _check_something_left(total)
    _report(ctx.output, config, funnels)
    return _metrics(total)


def _check_languages(config: Corpus) -> None:
    known = known_languages()
    for i, code in enumerate(config.languages):
        if code not in known:
            raise UserError(
                f"corpus.languages[{i}]: {code!r}: cannot be identified; choose from {', '.join(known)}, "
                "or leave languages empty to keep every language"
            )


def _clean(ctx: StageContext, config: Corpus, files: list[SourceFile]) -> Iterable[Cleaned]:
    parts = ctx.scratch / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    cleaner = Cleaner(config=config, storage=ctx.resolved.storage, scratch=parts)
    workers = available_cpus() if sum(f.bytes for f in files) > _PARALLEL_BYTES else 1
    return map_in_order(cleaner, units_of(files), workers=workers)


def _merge(
    ctx: StageContext, config: Corpus, cleaned: Iterable[Cleaned], funnels: list[Funnel], *, num_files: int
) -> None:
    """Write what is kept, in the order of sources, files and records; count into ``funnels``, one per source."""
    seen, files_done = SeenTexts() if config.dedup is Dedup.EXACT else None, 0
    with DocumentWriter(ctx.output) as writer:
        for done in cleaned:
            _merge_part(done, funnels, seen, writer)
            files_done += len(done.unit.files)
            kept = total_of(funnels).kept.documents
            ctx.report(
                phase="Running", done=files_done, total=num_files, unit="files", message=f"{kept:,} documents kept"
            )
            if ctx.stop_requested():
                raise Stopped("stopped before the corpus was complete; the next attempt starts over")


def _merge_part(done: Cleaned, funnels: list[Funnel], seen: SeenTexts | None, writer: DocumentWriter) -> None:
    funnel = done.funnel
    for candidate in read_part(done.part):
        if seen is None or seen.is_new(candidate.digest):
            writer.write(candidate.line)
        else:
            funnel.drop("dedup", candidate.characters)
    done.part.unlink()
    funnels[done.unit.source] = funnels[done.unit.source].plus(funnel)


def _check_something_left(total: Funnel) -> None:
    if total.read.documents == 0:
        raise UserError("corpus.sources: the files hold no documents; check the addresses and each source's format")
    if total.kept.documents == 0:
        raise UserError(
            f"corpus: no document is left: {total.summary()}; relax the field that dropped most, or add other sources"
        )


def _report(folder: Path, config: Corpus, funnels: list[Funnel]) -> None:
    """Write the funnel to ``report.json`` and print it as a table."""
    names = [source.uri for source in config.sources]
    sources = [{"uri": name} | funnel.as_json() for name, funnel in zip(names, funnels, strict=True)]
    report = {"total": total_of(funnels).as_json(), "sources": sources}
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
    print(render_table(names, funnels), flush=True)


def _metrics(total: Funnel) -> dict[str, float]:
    duplicates = total.dropped.get("dedup")
    return {
        "documentsIn": total.read.documents,
        "documentsOut": total.kept.documents,
        "charactersOut": total.kept.characters,
        "duplicates": 0 if duplicates is None else duplicates.documents,
    }
