"""The cost of a stage, before it starts: parameters, floating-point operations, memory. Pure arithmetic."""

from headrace_api.planning.cost import Estimate, adapter_of, estimate_training
from headrace_api.planning.memory import Memory

__all__ = ["Estimate", "Memory", "adapter_of", "estimate_training"]
