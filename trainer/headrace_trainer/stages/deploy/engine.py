"""The engine as a child process: it dies with this process, and its log is forwarded and its last lines kept."""

import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Thread

from headrace_trainer.processes import die_with_parent

_LAST_LINES = 12
_LAST_CHARACTERS = 1200
"""An outcome's message has room for 2000."""
_LOG_SECONDS = 2.0


class EngineFailed(RuntimeError):
    """The engine died or does not answer properly. The message ends with the last lines of its log."""


class EngineProcess:
    """A running engine. It leads a process group, so that its workers are killed with it, but stays in this process's
    session, so that the agent reaches them even after this process was killed.

    Create it in a thread that lives as long as it should: the kernel's parent-death signal follows the thread.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> None:
        self.name = " ".join([Path(command[0]).name, *command[1:2]])
        self._process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
            preexec_fn=die_with_parent,
        )
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._log = Thread(target=self._pass_on, daemon=True)
        self._log.start()

    @property
    def pid(self) -> int:
        """The process id, and its group's."""
        return self._process.pid

    def check(self) -> None:
        """Check that the engine is running.

        Raises:
            EngineFailed: it has exited.
        """
        code = self._process.poll()
        if code is not None:
            self._log.join(_LOG_SECONDS)
            raise self.failed(_how_it_ended(code))

    def failed(self, what: str) -> EngineFailed:
        """An error with what happened, the process, and its last log lines."""
        last = "\n".join(self._lines)[-_LAST_CHARACTERS:] or "nothing"
        return EngineFailed(f"{self.name} (process {self.pid}) {what}; its log ends with:\n{last}")

    def stop(self, *, grace_seconds: float) -> None:
        """Stop the engine and its group: SIGTERM, then SIGKILL after ``grace_seconds``."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(grace_seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._log.join(_LOG_SECONDS)

    def _pass_on(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip():
                self._lines.append(line.rstrip())
                print(line.rstrip(), file=sys.stderr, flush=True)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    hint = "; if nobody did that, it may have run out of memory" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"
