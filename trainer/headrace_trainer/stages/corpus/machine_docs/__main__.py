"""``python -m headrace_trainer.stages.corpus.machine_docs --out DIR [--max-mb 40]``.

The folder appears whole or not at all, and replaces one that this command wrote before. Exit code 2 if the folder
cannot be used.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from headrace_trainer.errors import UserError
from headrace_trainer.stages.corpus.machine_docs.docstrings import find_docstrings
from headrace_trainer.stages.corpus.machine_docs.found import up_to
from headrace_trainer.stages.corpus.machine_docs.manuals import find_manuals
from headrace_trainer.stages.corpus.machine_docs.pages import find_pages
from headrace_trainer.stages.corpus.machine_docs.readmes import find_readmes
from headrace_trainer.stages.corpus.machine_docs.write import (
    Written,
    write_jsonl,
    write_parquet,
    write_text,
    write_warc,
)

SUMMARY_FILE = "_summary.json"
"""Marks a folder that this command wrote. Corpus readers skip names that start with ``_``."""

# Folder -> its share of the total, and what fills it up to a number of bytes.
_FORMATS: dict[str, tuple[float, Callable[[Path, int], Written]]] = {
    "jsonl": (0.55, lambda folder, n: write_jsonl(folder, up_to(find_docstrings(max_bytes=n), max_bytes=n))),
    "text": (0.20, lambda folder, n: write_text(folder, up_to(find_manuals(), max_bytes=n))),
    "parquet": (0.10, lambda folder, n: write_parquet(folder, up_to(find_readmes(), max_bytes=n))),
    "warc": (0.15, lambda folder, n: write_warc(folder, up_to(find_pages(), max_bytes=n))),
}


def gather(out: Path, *, max_mb: float) -> list[Written]:
    """Write every format below ``out``.

    Args:
        out: a folder that does not exist yet, is empty, or was written by this function.
        max_mb: the limit for all texts and pages together, in MB before compression.

    Raises:
        UserError: ``out`` holds anything else.
    """
    _check_replaceable(out)
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    written = [_fill(staged / name, share * max_mb * 1e6, fill) for name, (share, fill) in _FORMATS.items()]
    (staged / SUMMARY_FILE).write_text(json.dumps([w.as_json() for w in written], indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    staged.rename(out)
    return written


def _check_replaceable(out: Path) -> None:
    if not out.exists() or (out / SUMMARY_FILE).is_file():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise UserError(f"--out: {str(out)!r}: exists and was not written by this command; name another folder")


def _fill(folder: Path, max_bytes: float, fill: Callable[[Path, int], Written]) -> Written:
    folder.mkdir(parents=True)
    return fill(folder, int(max_bytes))


def render_table(written: list[Written]) -> str:
    """The summary as a text table."""
    rows = [f"{w.format:<8}{w.files:>8,}{w.documents:>12,}{w.bytes / 1e6:>9.1f}" for w in written]
    documents, size = sum(w.documents for w in written), sum(w.bytes for w in written)
    total = f"{'all':<8}{sum(w.files for w in written):>8,}{documents:>12,}{size / 1e6:>9.1f}"
    return "\n".join([f"{'format':<8}{'files':>8}{'documents':>12}{'MB':>9}", *rows, total])


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m headrace_trainer.stages.corpus.machine_docs", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--max-mb", type=float, default=40.0, help="limit on the text, in MB before compression (40)")
    args = parser.parse_args(argv)
    try:
        written = gather(args.out.absolute(), max_mb=args.max_mb)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(render_table(written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
