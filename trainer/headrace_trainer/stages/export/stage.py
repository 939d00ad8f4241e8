"""The export stage: read, rename, write, reload."""

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig

from headrace_api.stages import Export
from headrace_api.stages.export import ExportDtype
from headrace_trainer.formats.huggingface.configs import huggingface_config
from headrace_trainer.formats.huggingface.names import to_huggingface
from headrace_trainer.formats.model_card import CHECKPOINT_FOLDER, TOKENIZER_FOLDER, ModelCard, read_card
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.export.card import model_card
from headrace_trainer.stages.export.lineage import lineage
from headrace_trainer.stages.export.parity import check_export
from headrace_trainer.stages.export.weights import read_weights

_DTYPES = {ExportDtype.FP32: torch.float32, ExportDtype.BF16: torch.bfloat16}
_NAMES = {ExportDtype.FP32: "float32", ExportDtype.BF16: "bfloat16"}
_LARGEST_FILE = "5GB"
_SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
"""Defaults for clients that set none. Greedy continuations of base models soon repeat themselves (arXiv 1904.09751)."""


def run_export(ctx: StageContext) -> dict[str, float]:
    """Write safetensors, configuration, tokenizer, generation settings and a model card.

    Returns:
        The number of parameters, and the size of the weights in bytes.

    Raises:
        RuntimeError: what was written does not load as the model that was read.
    """
    config = ctx.config
    assert isinstance(config, Export)
    trained = ctx.input("model")
    card = read_card(trained)
    ctx.report(phase="Running", message="reading the checkpoint")
    tensors = {
        name: tensor.to(_DTYPES[config.dtype])
        for name, tensor in to_huggingface(read_weights(trained / CHECKPOINT_FOLDER), card).items()
    }
    ctx.report(phase="Running", message="writing the model")
    write_model(ctx.output, tensors, card, dtype=config.dtype)
    shutil.copytree(trained / TOKENIZER_FOLDER, ctx.output, dirs_exist_ok=True)
    ancestors = lineage(ctx.store, ctx.resolved.inputs["model"])
    (ctx.output / "README.md").write_text(model_card(ctx.resolved, card, trained, ancestors=ancestors))
    ctx.report(phase="Running", message="verifying the export")
    check_export(ctx.output, tensors)
    bytes_written = sum(t.numel() * t.element_size() for t in tensors.values())
    return {"parameters": float(sum(t.numel() for t in tensors.values())), "bytesOut": float(bytes_written)}


def write_model(folder: Path, tensors: dict[str, torch.Tensor], card: ModelCard, *, dtype: ExportDtype) -> None:
    """Write the weights (in several files with an index if they are large) and both configurations."""
    save_torch_state_dict(tensors, folder, max_shard_size=_LARGEST_FILE)
    huggingface_config(card, dtype=_NAMES[dtype]).save_pretrained(folder)
    stops = [*card.stop_ids] or card.eod_id
    ids = {
        "bos_token_id": card.first_id,
        "eos_token_id": stops,
        "pad_token_id": card.eod_id,
    }
    generation: Any = GenerationConfig
    generation(**ids, **_SAMPLING).save_pretrained(folder)
