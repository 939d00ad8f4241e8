"""Tests that need a GPU. Collected only where there is one, and only by ``make test-gpu``."""

collect_ignore_glob = []
