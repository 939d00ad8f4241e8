"""``python -m headrace_trainer.agent stage.json``."""

import os
import signal
import sys


def main() -> int:
    """Supervise. Until that begins there is nothing to save, so SIGTERM exits at once with ``ExitCode.STOPPED``."""
    # Set before the imports and the first storage access: PID 1 of a container ignores signals without a handler, so a
    # pod deleted now would linger for its whole grace period. Not sys.exit: if the signal lands in an import or a
    # finalizer, the exception may be swallowed and the request lost.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(os.EX_TEMPFAIL))
    from headrace_trainer.agent.supervise import main as supervise

    return supervise(sys.argv[1:])


sys.exit(main())
