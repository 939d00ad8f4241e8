"""The gang: process groups, the axes of a layout, and how ranks agree. ``with join_gang(...)`` is the whole life of it."""

from headrace_trainer.engine.parallel.gang import Gang
from headrace_trainer.engine.parallel.groups import join_gang

__all__ = ["Gang", "join_gang"]
