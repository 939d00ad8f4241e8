"""Pods that end with the test."""

import pytest

from trainer.agent.pods import Pods


@pytest.fixture
def pods(tmp_path):
    """Start the pods of an attempt; at most one attempt a test."""
    started = []

    def start(script, **options):
        started.append(Pods(tmp_path, script, **options))
        return started[-1]

    yield start
    for attempt in started:
        attempt.clear()
