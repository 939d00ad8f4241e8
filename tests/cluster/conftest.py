"""Loads the cluster fixtures for this folder's tests, and leaves out what is not about another cluster."""

import os

import pytest

from cluster.command import OTHER_CLUSTER
from cluster.fixtures import cluster, namespace, python

__all__ = ["cluster", "namespace", "python"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get(OTHER_CLUSTER):
        about_own = [item for item in items if item.get_closest_marker("own_cluster")]
        config.hook.pytest_deselected(items=about_own)
        items[:] = [item for item in items if item not in about_own]
