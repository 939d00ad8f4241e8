"""The gang: process groups, the axes of a layout, and how ranks agree. ``with gang(...)`` is the whole life of it."""

from headrace_trainer.parallel.gang import Gang
from headrace_trainer.parallel.groups import gang

__all__ = ["Gang", "gang"]
