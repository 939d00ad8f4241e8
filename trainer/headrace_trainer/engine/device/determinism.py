"""The same step twice gives the same bits: what Megatron-core's guide to deterministic training asks for.

In: this process's environment, before the first kernel runs. Out: the environment that NCCL, cuBLAS and Transformer
Engine read, and torch's own switches; ``model.build`` sets Megatron's ``deterministic_mode`` beside them.
"""

from collections.abc import MutableMapping

import torch

from headrace_trainer.errors import UserError

_ACCEPTED = {
    # NVLS adds up in the switch, and Tree's order changes between NCCL versions.
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


def be_deterministic(environment: MutableMapping[str, str]) -> None:
    """Choose deterministic algorithms everywhere; an operation that has none raises.

    Args:
        environment: read and completed; a value that is there already is kept.

    Raises:
        UserError: a variable is set to a value that gives other bits on another day.
    """
    for name, accepted in _ACCEPTED.items():
        value = environment.setdefault(name, accepted[0])
        if value not in accepted:
            raise UserError(
                f"{name}: {value!r}: results would differ between two runs: unset it in the runtime's pod template, "
                f"or use {' or '.join(accepted)}"
            )
    torch.use_deterministic_algorithms(True)
    # It would fill every torch.empty with NaN: a write of each activation, and nothing reads them before they are set.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
