"""What a stage will cost before it starts: parameters, floating-point operations, memory. Pure arithmetic."""

from headrace_api.planning.cost import PretrainEstimate, estimate_pretrain

__all__ = ["PretrainEstimate", "estimate_pretrain"]
