"""The program behind ``sandbox``: runs code in a child with limits, and ends everything that it leaves behind.

The child may not open sockets: seccomp takes that right from a process without privileges too, as in a restricted pod,
where namespaces are out of reach. A program of its own that imports nothing but the standard library, and starts in milliseconds. In: JSON on its standard
input. Out: JSON on its standard output.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_SOCKET = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""Processor -> how the kernel calls it, and its number of the system call ``socket``."""
_IO_URING_SETUP = 425
"""Opens sockets too."""
_X32 = 0x40000000
"""Numbers from here on are the same calls once more, on x86_64."""
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
    libc = ctypes.CDLL(None, use_errno=True)
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
        os.setgroups([])
        os.setgid(_USER)
        libc.prctl(_PR_SET_KEEPCAPS, 1)
        os.setuid(_USER)
        # Reading alone stays: the interpreter's modules may be where only root reads.
        for kept in (_CAP_DAC_READ_SEARCH, 0):
            header, data = (_CAPABILITY_VERSION, 0), (kept, kept, 0, 0, 0, 0)
            if libc.capset((ctypes.c_uint32 * 2)(*header), (ctypes.c_uint32 * 6)(*data)) == 0:
                break
    _refuse_sockets(libc)
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_NPROC, _PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def _refuse_sockets(libc: ctypes.CDLL) -> None:
    """Let ``socket`` fail as forbidden, in this process and all that it starts.

    Raises:
        OSError: the kernel does not filter system calls.
        KeyError: not known how on this processor.
    """
    processor, call = _SOCKET[platform.machine()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allowed, forbidden = 0x7FFF0000, 0x00050000 | errno.EACCES
    steps = [
        (load, 0, 0, 4),
        (equal, 0, 5, processor),
        (load, 0, 0, 0),
        (equal, 3, 0, call),
        (equal, 2, 0, _IO_URING_SETUP),
        (at_least, 1, 0, _X32),
        (answer, 0, 0, allowed),
        (answer, 0, 0, forbidden),
    ]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(filters)))
    for option, *rest in ((_PR_SET_NO_NEW_PRIVS, 1, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program)):
        if libc.prctl(option, *rest, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


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
