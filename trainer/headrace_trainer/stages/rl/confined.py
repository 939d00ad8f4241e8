"""The program behind ``sandbox``: runs code in a child with limits, and ends everything that it leaves behind.

A program of its own that imports nothing but the standard library, and starts in milliseconds. In: JSON on its standard
input. Out: JSON on its standard output.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
_PR_SET_KEEPCAPS = 8
_CAPABILITY_VERSION, _CAP_DAC_READ_SEARCH = 0x20080522, 1 << 2
_USER = 61_234
"""Who root becomes: nobody's, so that the number of its processes can be limited, and no file is its own."""
_PROCESSES = 16
_FILES = 64
_FILE_BYTES = 2**20
_KILL_SECONDS = 10.0


def main() -> None:
    """Run what standard input asks for."""
    asked = json.loads(sys.stdin.buffer.read())
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _run(asked, libc, reader, writer)
    os.close(writer)
    status = _wait(child, seconds=asked["real_seconds"])
    _kill_children()
    os.set_blocking(reader, False)
    try:
        said = os.read(reader, 4096)
    except BlockingIOError:
        said = b""
    passed = status == 0 and said == asked["word"].encode()
    timed_out = status is None or status == -signal.SIGXCPU
    sys.stdout.write(json.dumps({"passed": passed, "timed_out": timed_out}))


def _run(asked: dict[str, Any], libc: ctypes.CDLL, reader: int, writer: int) -> NoReturn:
    """In the child. Tests that end early, as by sys.exit(0), do not say the word."""
    code = 1
    try:
        os.close(reader)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        os.chdir(asked["folder"])
        _confine(libc, seconds=asked["seconds"], memory=asked["memory"], folder=asked["folder"])
        space = {"__name__": "__main__"}
        exec(compile(asked["code"], "<answer>", "exec"), space)
        exec(compile(asked["tests"], "<tests>", "exec"), space)
        os.write(writer, asked["word"].encode())
        code = 0
    finally:
        os._exit(code)


def _confine(libc: ctypes.CDLL, *, seconds: int, memory: int, folder: str) -> None:
    if os.getuid() == 0:
        os.chown(folder, _USER, _USER)
        libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC)
        os.setgroups([])
        os.setgid(_USER)
        libc.prctl(_PR_SET_KEEPCAPS, 1)
        os.setuid(_USER)
        # Reading alone stays: the interpreter's modules may be where only root reads.
        for kept in (_CAP_DAC_READ_SEARCH, 0):
            header, data = (_CAPABILITY_VERSION, 0), (kept, kept, 0, 0, 0, 0)
            if libc.capset((ctypes.c_uint32 * 2)(*header), (ctypes.c_uint32 * 6)(*data)) == 0:
                break
    else:
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC)
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_NPROC, _PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def _wait(child: int, *, seconds: float) -> int | None:
    """The child's exit code, negative for a signal; None where it did not end in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def _kill_children() -> None:
    """Kill until nothing is left: orphans become children of this process, in whatever session they are."""
    deadline = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < deadline:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _children() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(entry.parent.name))
    return found


if __name__ == "__main__":
    main()
