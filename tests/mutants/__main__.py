"""``make mutants``: do the tests notice when the code is wrong?

``pure`` lets mutmut change the rooms that decide and build without I/O, thousands of times, and runs the tests that
reach the changed function. ``handwritten`` applies mistakes that were once made, or nearly, to the rest. Prints a table;
exit status 1 where fewer than ``LEAST_KILLED`` of the pure mutants die, a survivor is not explained, or a handwritten
mutant lives.

Usage: python tests/mutants [pure] [handwritten [NAME ...]]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutants import handwritten, pure


def main(argv: list[str]) -> int:
    """Run what is named, or everything."""
    failed = False
    if not argv or "pure" in argv:
        failed |= not pure.run()
    if not argv or "handwritten" in argv:
        failed |= not handwritten.run([name for name in argv if name not in ("pure", "handwritten")])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
