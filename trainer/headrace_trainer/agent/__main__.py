"""``python -m headrace_trainer.agent stage.json``."""

import os
import signal
import sys


def main() -> int:
    """Supervise; until then there is nothing to save, and being asked to stop ends the process with ``ExitCode.STOPPED``."""
    # Before the imports and the first look at storage: a container's first process does not die of a signal that it has
    # no handler for, and a pod deleted now would stay for its whole grace period. Not sys.exit: an import or a finalizer
    # that the signal meets may swallow the exception, and the request with it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(os.EX_TEMPFAIL))
    from headrace_trainer.agent.supervise import main as supervise

    return supervise(sys.argv[1:])


sys.exit(main())
