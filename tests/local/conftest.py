"""A separate home for each test; no process outlives it."""

import signal
import socket
from collections.abc import Iterator

import pytest

from workplace import Workplace


@pytest.fixture
def headrace(tmp_path):
    workplace = Workplace(tmp_path)
    yield workplace
    left = workplace.processes()
    for process in left:
        process.send_signal(signal.SIGKILL)


class SilentServer:
    """An S3 endpoint that takes connections and never answers: what reads from it waits until the test ends."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        """Refuse new connections and reset the old ones."""
        self._socket.close()


@pytest.fixture
def silent() -> Iterator[SilentServer]:
    server = SilentServer()
    yield server
    server.close()


@pytest.fixture
def waiting(headrace, silent):
    """A run whose first agent waits for storage, before it has started a rank."""
    headrace.env |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    (headrace.folder / "raw").mkdir()
    storage = {"uri": "s3://bucket/run", "endpoint": silent.address}
    headrace.manifest_of = lambda **spec: headrace.manifest("corpus", "tok", storage=storage, **spec)
    headrace.manifest_of()
    return headrace


@pytest.fixture
def waiting_rank(headrace, silent):
    """A run whose first rank waits for its input."""
    headrace.env |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    headrace.manifest(
        "corpus", "tok",
        storage={"uri": str(headrace.folder / "store"), "endpoint": silent.address},
        edit=lambda s: s["corpus"]["corpus"].update(sources=[{"uri": "s3://bucket/raw"}]),
    )  # fmt: skip
    return headrace
