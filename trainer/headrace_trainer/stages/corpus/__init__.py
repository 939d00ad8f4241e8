"""The corpus stage: raw files in many formats -> cleaned documents, with a report of what was dropped and why.

``sources`` finds the files, ``readers`` reads them, ``clean`` filters each text by ``language`` and ``quality``,
``dedup`` drops duplicates, ``funnel`` counts; ``stage`` runs them in order. ``machine_docs``, a separate command,
gathers English text that every installation has.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> dict[str, float]:
    """Read, filter and deduplicate the sources of ``ctx.config`` into ``ctx.output``."""
    # Imported late: datatrove and trafilatura take seconds to load, and readers of finished corpora need neither.
    from headrace_trainer.stages.corpus.stage import run_corpus

    return run_corpus(ctx)
