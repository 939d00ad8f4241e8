"""The cost of a stage, before it starts: parameters, floating-point operations, memory. Pure arithmetic."""

from headrace_api.planning.cost import PretrainEstimate, estimate_pretrain
from headrace_api.planning.memory import Memory

__all__ = ["Memory", "PretrainEstimate", "estimate_pretrain"]
