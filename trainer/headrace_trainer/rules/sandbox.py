"""Python that a model wrote, run where it can do little harm: processes of its own with limits, and no network.

In: code and tests. Out: whether the tests ran to their end without an error. ``confined`` is the program that does it, in
an interpreter of its own. A fence against a model's mistakes, not against an attacker: it can read what its user can.
"""

import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from headrace_trainer.processes import die_with_parent

_REAL_TIME = 4
"""Real time that may pass, in units of the processor time that is allowed: a loaded machine is no reason to fail."""
_GRACE_SECONDS = 30.0
"""How long the program may take beyond that to start, to kill what is left, and to answer."""
_CONFINED = Path(__file__).with_name("confined.py")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one run may take."""

    seconds: int
    """Processor time of each process."""
    memory: int
    """Bytes of address space of each process."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended."""

    passed: bool
    timed_out: bool = False


def passes(code: str, tests: str, limits: Limits) -> Ended:
    """Run the code, then the tests. Nothing that they start is left when this returns.

    Returns:
        Whether both came to their end without an error; ``timed_out`` where time ran out.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-", ignore_cleanup_errors=True) as folder:
        asked = {
            "code": code,
            "tests": tests,
            "word": secrets.token_hex(16),
            "seconds": limits.seconds,
            "real_seconds": _REAL_TIME * limits.seconds,
            "memory": limits.memory,
            "folder": folder,
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CONFINED)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={"PATH": "/usr/bin:/bin", "HOME": folder},
            preexec_fn=die_with_parent,
        )
        said = b""
        with contextlib.suppress(subprocess.TimeoutExpired):
            said, _ = process.communicate(
                json.dumps(asked).encode(), timeout=_REAL_TIME * limits.seconds + _GRACE_SECONDS
            )
        if process.poll() is None:
            process.kill()
            process.communicate()
    try:
        return Ended(**json.loads(said))
    except ValueError:
        return Ended(passed=False, timed_out=process.returncode < 0)
