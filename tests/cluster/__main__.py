"""Entry point: `python3 tests/cluster build|up|status|down|load|fail-node|heal`. Needs Python's standard library only."""

import sys
from pathlib import Path

# Running a folder puts the folder itself on the path; the package is found from its parent.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
