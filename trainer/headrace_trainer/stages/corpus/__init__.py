"""The corpus stage: raw files in many formats -> cleaned documents, with a report of what was dropped and why.

``sources`` finds the files, ``readers`` reads them, ``clean`` judges each text by ``language`` and ``quality``, ``dedup``
drops repeats, ``funnel`` counts. ``stage`` puts them in order.
Beside the stage, ``machine_docs`` gathers English text that every installation has.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> dict[str, float]:
    """Read, filter and deduplicate the sources of ``ctx.config`` into ``ctx.output``."""
    # Imported here: readers of finished corpora need neither datatrove nor trafilatura, which take seconds to load.
    from headrace_trainer.stages.corpus.stage import run_corpus

    return run_corpus(ctx)
