"""Objects as the API server sends them: JSON, not parsed into classes."""

from typing import Any

Raw = dict[str, Any]
"""A Kubernetes object."""
