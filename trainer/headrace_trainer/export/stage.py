"""The order of an export: read, rename, write, load again."""

import shutil

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from headrace_api.stages import Export
from headrace_api.stages.export import ExportDtype
from headrace_trainer.export.card import model_card
from headrace_trainer.export.llama import llama_config, to_llama
from headrace_trainer.export.parity import check_export
from headrace_trainer.export.weights import read_weights
from headrace_trainer.model.card import CHECKPOINT_FOLDER, TOKENIZER_FOLDER, read_card
from headrace_trainer.stage import StageContext

_DTYPES = {ExportDtype.FP32: torch.float32, ExportDtype.BF16: torch.bfloat16}
_NAMES = {ExportDtype.FP32: "float32", ExportDtype.BF16: "bfloat16"}


def run_export(ctx: StageContext) -> dict[str, float]:
    """Write safetensors, configuration, tokenizer, generation settings and a model card.

    Returns:
        The number of parameters and the bytes of the weights.
    """
    config = ctx.config
    assert isinstance(config, Export)
    trained = ctx.input("model")
    card = read_card(trained)
    ctx.report(phase="Running", message="reading the checkpoint")
    tensors = to_llama(read_weights(trained / CHECKPOINT_FOLDER), card)
    tensors = {name: tensor.to(_DTYPES[config.dtype]) for name, tensor in tensors.items()}
    save_file(tensors, ctx.output / "model.safetensors", metadata={"format": "pt"})
    llama_config(card, dtype=_NAMES[config.dtype]).save_pretrained(ctx.output)
    GenerationConfig(
        bos_token_id=card.eod_id, eos_token_id=card.eod_id, pad_token_id=card.eod_id, max_length=card.sequence_length
    ).save_pretrained(ctx.output)
    shutil.copytree(trained / TOKENIZER_FOLDER, ctx.output, dirs_exist_ok=True)
    (ctx.output / "README.md").write_text(model_card(ctx.resolved, card, trained))
    ctx.report(phase="Running", message="loading what was written")
    check_export(ctx.output, tensors)
    bytes_written = sum(t.numel() * t.element_size() for t in tensors.values())
    return {"parameters": float(sum(t.numel() for t in tensors.values())), "bytesOut": float(bytes_written)}
