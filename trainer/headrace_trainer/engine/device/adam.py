"""AdamW with Transformer Engine's state layout, for machines without it.

The distributed optimizer's checkpoints expect ``step`` in the parameter group and two moments a parameter;
``torch.optim.AdamW`` keeps a step tensor for each parameter, which does not survive resharding.
"""

from collections.abc import Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) or Adam with an L2 penalty, by torch's fused kernel, one call a parameter group.

    Args:
        params: parameter groups.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: taken off the weights, scaled by ``lr``.
        adam_w_mode: False adds the decay to the gradient instead.
        bias_correction: kept in the groups, as Transformer Engine does; always on here.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
    ) -> None:
        self._kernel = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction})

    def initialize_state(self, parameter: torch.Tensor) -> None:
        """Give a parameter its two moments, zero, in fp32."""
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[parameter][name] = torch.zeros_like(parameter, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            # Counted for empty groups too: ranks that hold none of its parameters must agree on the step.
            group["step"] = int(group.get("step", 0)) + 1
            updated = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if updated:
                self._update(group, updated)

    def _update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            if "exp_avg" not in self.state[parameter]:
                self.initialize_state(parameter)
        states = [self.state[p] for p in parameters]
        step = torch.full((), float(group["step"]), device=parameters[0].device)  # a copy would wait for the GPU
        self._kernel(
            [p.data for p in parameters],
            [p.grad for p in parameters],  # type: ignore[misc]
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [step] * len(parameters),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )
