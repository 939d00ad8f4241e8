"""What each mutant became and changed, as JSON on standard output; run in the folder where mutmut ran.

One process for all of them: ``mutmut show`` takes a second for each.
"""

import json
import sys

from mutmut.__main__ import status_by_exit_code, walk_mutatable_files
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant

_DID_NOT_RUN = 255
"""mutmut's own failure to run the tests, which it calls a time-out."""


def main() -> None:
    """Print ``[name, state, diff]`` for every mutant; the diff is left out of those that were killed."""
    rows = []
    for path in walk_mutatable_files():
        file = SourceFileMutationData(path=path)
        file.load()
        for name, code in file.exit_code_by_key.items():
            state = "did not run" if code == _DID_NOT_RUN else status_by_exit_code[code]
            rows.append([name, state, "" if state == "killed" else get_diff_for_mutant(name, path=path)])
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
