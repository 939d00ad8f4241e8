"""The export's final check: reload what was written and compare it with the trained model.

Exports are known to fail silently: renamed weights are left out, reshaped ones are zero.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_PROBE = "The quick brown fox jumps over the lazy dog."


def check_export(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Load the folder as a user would, and compare.

    Args:
        folder: the exported folder.
        expected: the tensors that were written.

    Raises:
        RuntimeError: a weight is missing, unexpected, different or zero, or the output is not finite.
    """
    model = _load(folder)
    wrong = "; ".join(_wrong_weights(model, expected))
    if wrong:
        raise RuntimeError(f"{folder}: {wrong}")
    ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)(_PROBE, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError(f"{folder}: the exported model's logits are not finite")


def _load(folder: Path) -> torch.nn.Module:
    found: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    model, info = found
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v}
    if wrong:
        raise RuntimeError(f"{folder}: transformers cannot load the export: {wrong}")
    assert isinstance(model, torch.nn.Module)
    return model


def _wrong_weights(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> Iterator[str]:
    loaded = model.state_dict()
    differing = [name for name, tensor in expected.items() if not torch.equal(loaded[name], tensor)]
    # A weight that is all zeros, where what was written is not, was never read.
    zero = [name for name, tensor in loaded.items() if not tensor.any() and _has_values(expected.get(name))]
    if differing:
        yield f"weights differ after reloading: {', '.join(differing)}"
    if zero:
        yield f"weights are zero: {', '.join(zero)}"


def _has_values(expected: torch.Tensor | None) -> bool:
    return expected is None or bool(expected.any())
