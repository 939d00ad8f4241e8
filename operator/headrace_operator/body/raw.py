"""What the API server speaks: objects as JSON, not parsed into classes."""

from typing import Any

Raw = dict[str, Any]
"""A Kubernetes object."""
