"""The gang: process groups, the axes of a layout, and how ranks agree. ``with join_gang(...)`` is the whole life of it."""

from headrace_trainer.engine.parallel.gang import Gang, Sum
from headrace_trainer.engine.parallel.groups import join_gang

__all__ = ["Gang", "Sum", "join_gang"]
