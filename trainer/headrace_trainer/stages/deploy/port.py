"""Find a free port on a shared machine."""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from headrace_trainer.errors import UserError

LOOPBACK = "127.0.0.1"
_LAST = 65535


@contextmanager
def claimed_port(first: int) -> Iterator[int]:
    """The next free port from ``first``, reserved against other runs on this machine until the block ends.

    An engine starts listening only once its model is loaded. Until then the reservation is a name in the kernel's
    abstract socket namespace: it vanishes with the process, leaves no file, and is visible wherever the port would be.

    Raises:
        UserError: no port is free.
    """
    for port in range(first, _LAST + 1):
        with socket.socket(socket.AF_UNIX) as claim:
            if _binds(claim, f"\0headrace-port-{port}") and _is_free(port):
                yield port
                return
    raise UserError(f"deploy.port: {first}: no free port from there to {_LAST}; choose a lower one")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: an earlier server's connections in TIME_WAIT do not block its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _binds(probe, (LOOPBACK, port))


def _binds(sock: socket.socket, address: str | tuple[str, int]) -> bool:
    try:
        sock.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True
