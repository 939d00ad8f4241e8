"""The readiness probe of a serving pod: ``python -m headrace_trainer.stages.deploy.ready``.

In: ``HEADRACE_SCRATCH``, with the note left by ``stage``. Out: exit code 0 if the server answers a completion, else 1.
"""

import json
import os
import sys
from pathlib import Path

from headrace_trainer.stages.deploy.client import Refused, complete

SERVER_FILE = "server.json"
"""In the scratch folder; holds the port."""
_TIMEOUT_SECONDS = 4.0
"""For each of two requests; together they fit into the probe's ten seconds."""


def main() -> int:
    """Ask for one token. Errors go to standard error, where ``kubectl describe`` shows them."""
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
