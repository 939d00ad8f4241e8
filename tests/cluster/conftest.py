"""Loads the cluster fixtures for this folder's tests."""

from cluster.fixtures import cluster, namespace, python

__all__ = ["cluster", "namespace", "python"]
