"""Mistakes written by hand, each with the tests that must notice it.

In: ``MUTANTS``. For each: a copy of the checkout with one text replaced, and the named tests run in it. They pass in an
unspoiled copy, and at least one of them fails in the spoiled one.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mutants.tree import REPO, copy_checkout, environment


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One mistake."""

    name: str
    file: str
    before: str
    """Text that stands exactly once in the file."""
    after: str
    tests: tuple[str, ...]
    """pytest's node ids."""


MUTANTS: tuple[Mutant, ...] = ()


def run(names: list[str]) -> bool:
    """Try the mutants of these names, or all; print what became of each; whether all died."""
    chosen = [m for m in MUTANTS if not names or m.name in names]
    with tempfile.TemporaryDirectory(prefix="headrace-mutants-") as folder:
        tree = Path(folder)
        copy_checkout(tree)
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        if tests and (code := _pytest(tree, tests)) != 0:
            print(f"the tests do not pass without a mutant: pytest ended with {code}")
            return False
        alive = [mutant.name for mutant in chosen if not _is_killed(tree, mutant)]
    print(
        f"handwritten mutants: {len(chosen) - len(alive)} of {len(chosen)} killed; alive: {', '.join(alive) or 'none'}"
    )
    return not alive


def spoil(tree: Path, mutant: Mutant) -> str:
    """Make the mistake; returns the file's text as it was.

    Raises:
        ValueError: the text to replace does not stand exactly once in the file.
    """
    path = tree / mutant.file
    text = path.read_text()
    if text.count(mutant.before) != 1:
        raise ValueError(f"{mutant.name}: {mutant.before!r} stands {text.count(mutant.before)} times in {mutant.file}")
    path.write_text(text.replace(mutant.before, mutant.after))
    return text


def _is_killed(tree: Path, mutant: Mutant) -> bool:
    began, text = time.monotonic(), spoil(tree, mutant)
    try:
        code = _pytest(tree, list(mutant.tests))
    finally:
        (tree / mutant.file).write_text(text)
    print(f"{'killed' if code == 1 else 'ALIVE':<7} {mutant.name} ({time.monotonic() - began:.0f} s)", flush=True)
    return code == 1


def _pytest(tree: Path, tests: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        print(done.stdout[-3000:], done.stderr[-1000:])
    return done.returncode


__all__ = ["MUTANTS", "REPO", "Mutant", "run", "spoil"]
