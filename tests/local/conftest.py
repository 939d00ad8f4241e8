"""A home of its own for each test; nothing that it started outlives it."""

import signal

import pytest

from workplace import Workplace


@pytest.fixture
def headrace(tmp_path):
    workplace = Workplace(tmp_path)
    yield workplace
    left = workplace.processes()
    for process in left:
        process.send_signal(signal.SIGKILL)
