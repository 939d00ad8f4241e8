"""The gate before an export counts: what was written is loaded again, and is the model that was trained."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_PROBE = "The quick brown fox jumps over the lazy dog."


def check_export(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Load the folder as a user would, and compare.

    Args:
        folder: the exported folder.
        expected: the tensors that were written.

    Raises:
        RuntimeError: a weight is missing, unexpected or different, or the model's output is not finite.
    """
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    wrong = {k: sorted(v) for k, v in info.items() if v}
    if wrong:
        raise RuntimeError(f"{folder}: transformers does not load what was exported: {wrong}")
    loaded = model.state_dict()
    differing = [name for name, tensor in expected.items() if not torch.equal(loaded[name], tensor)]
    if differing:
        raise RuntimeError(f"{folder}: weights changed on their way: {', '.join(differing)}")
    ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)(_PROBE, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError(f"{folder}: the exported model's logits are not finite")
