"""torchrun, with a note of which rank failed first: ``explain`` reads it when the rank could not say so itself.

A killed rank leaves no words, and its peers only know that a connection closed.
"""

import json
import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from headrace_trainer.agent.outcomes import FIRST_FAILURE_FILE
from headrace_trainer.stage import write_atomically


def main(argv: list[str]) -> int:
    """Run torchrun's command line; 1 if a rank failed."""
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        note = {"rank": rank, "pid": failure.pid, "exitCode": failure.exitcode}
        write_atomically(Path(os.environ["HEADRACE_SCRATCH"]) / FIRST_FAILURE_FILE, json.dumps(note))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
