"""The readiness probe of a serving pod: ``python -m headrace_trainer.stages.deploy.ready``.

In: ``HEADRACE_SCRATCH``, and in it the note that ``stage`` leaves. Out: 0 if the server answers a completion now, else 1.
"""

import json
import os
import sys
from pathlib import Path

from headrace_trainer.stages.deploy.client import Refused, complete

SERVER_FILE = "server.json"
"""Holds the port, below the scratch folder."""
_TIMEOUT_SECONDS = 4.0
"""For each of two requests; both fit into the ten seconds that the pod gives a probe."""


def main() -> int:
    """Ask for one token; what is wrong goes to the standard error, where ``kubectl describe`` finds it."""
    note = Path(os.environ.get("HEADRACE_SCRATCH", "/tmp/headrace")) / SERVER_FILE
    try:
        port = int(json.loads(note.read_text())["port"])
        complete(f"http://127.0.0.1:{port}", max_tokens=1, timeout_seconds=_TIMEOUT_SECONDS)
    except (OSError, ValueError, KeyError, Refused) as error:
        print(f"not ready: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
