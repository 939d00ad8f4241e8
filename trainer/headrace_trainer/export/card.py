"""The model card: what the model is and where it comes from, from the artifacts alone."""

import json
from pathlib import Path

from headrace_api.contract import ResolvedStage
from headrace_api.stages import Export
from headrace_trainer.model.card import HISTORY_FILE, ModelCard


def model_card(resolved: ResolvedStage, card: ModelCard, trained: Path) -> str:
    """README.md of the exported folder.

    Args:
        resolved: the export stage.
        card: the model.
        trained: the folder of the checkpoint artifact, with the loss history.
    """
    config = resolved.stage.config
    assert isinstance(config, Export)
    front = {"license": config.license, "library_name": "transformers", "pipeline_tag": "text-generation"}
    lines = ["---", *(f"{k}: {v}" for k, v in front.items()), "---", f"# {resolved.run}", ""]
    lines += [f"A decoder of the Llama family, trained from random weights by the run `{resolved.run}`.", ""]
    lines += _table("Model", _model_rows(card))
    lines += _table("Training", _training_rows(trained / HISTORY_FILE))
    lines += _table("Origin", _origin_rows(resolved))
    lines += ["## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("<this folder>")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("<this folder>")', "```", ""]
    lines += ["It continues text. It was not trained to follow instructions, and nothing was done to make it safe.", ""]
    return "\n".join(lines)


def _model_rows(card: ModelCard) -> dict[str, str]:
    arch = card.architecture
    return {
        "Parameters": f"{arch.num_parameters(card.vocab_size):,}",
        "Layers": str(arch.layers),
        "Hidden size": str(arch.hidden_size),
        "Heads (query, key-value)": f"{arch.heads}, {arch.kv_heads}",
        "Feed-forward size": str(arch.ffn_hidden_size),
        "Vocabulary": f"{card.vocab_size:,}",
        "Context": f"{card.sequence_length:,} tokens",
        "Trained in": card.precision.value,
    }


def _training_rows(history: Path) -> dict[str, str]:
    records = [json.loads(line) for line in history.read_text().splitlines()]
    last = records[-1]
    rows = {"Steps": f"{last['step']:,}", "Tokens": f"{last['tokens']:,}", "Final training loss": f"{last['loss']:.4f}"}
    measured = [r["validation_loss"] for r in records if "validation_loss" in r]
    return rows | ({"Final validation loss": f"{measured[-1]:.4f}"} if measured else {})


def _origin_rows(resolved: ResolvedStage) -> dict[str, str]:
    rows = {"Run": resolved.run, "Seed": str(resolved.seed), "Export hash": resolved.hash}
    return rows | {f"Digest of {slot}": f"{ref.digest} ({ref.kind.value})" for slot, ref in resolved.inputs.items()}


def _table(title: str, rows: dict[str, str]) -> list[str]:
    return [f"## {title}", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items()), ""]
