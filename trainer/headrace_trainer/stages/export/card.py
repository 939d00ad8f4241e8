"""The model card: what the model is and where it comes from, derived from the artifacts alone.

It contains no time or place, so the same model gets the same card, and its folder the same digest.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from headrace_api.artifact import Artifact
from headrace_api.contract import ResolvedStage
from headrace_api.model import Family
from headrace_api.stages import Export
from headrace_trainer.formats.model_card import HISTORY_FILE, ModelCard

_NAMES = {
    Family.LLAMA: "Llama",
    Family.MISTRAL: "Mistral",
    Family.QWEN2: "Qwen2",
    Family.QWEN3: "Qwen3",
    Family.GEMMA: "Gemma",
}
_USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("<this folder>")
model = AutoModelForCausalLM.from_pretrained("<this folder>")
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```

It continues text. It was not trained to follow instructions, and nothing was done to make it safe.
"""
_CHAT_USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("<this folder>")
model = AutoModelForCausalLM.from_pretrained("<this folder>")
turns = [{"role": "user", "content": "Who are you?"}]
prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```

It was trained further on records after pretraining. Nothing was done to make it safe.
"""


def model_card(resolved: ResolvedStage, card: ModelCard, trained: Path, *, ancestors: Sequence[Artifact]) -> str:
    """README.md of the exported folder.

    Args:
        resolved: the export stage.
        card: the model.
        trained: the checkpoint artifact's folder, with the loss history.
        ancestors: the artifacts behind the model, the checkpoint last.
    """
    config = resolved.stage.config
    assert isinstance(config, Export)
    front = {"license": config.license, "library_name": "transformers", "pipeline_tag": "text-generation"}
    lines = ["---", *(f"{k}: {v}" for k, v in front.items()), "---", f"# {resolved.run}", ""]
    began = "random weights" if card.base is None else f"the model at `{card.base}`"
    lines += [
        f"A decoder of the {_NAMES[card.architecture.family]} family, trained from {began} by the run `{resolved.run}`.",
        "",
    ]
    lines += _section("Model", _rows({**_model_rows(card), "Weights": f"safetensors, {config.dtype.value}"}))
    lines += _section("Training", _rows(_training_rows(trained / HISTORY_FILE)))
    lines += _section("Lineage", _lineage(resolved, ancestors))
    return "\n".join([*lines, _CHAT_USE if card.stop_ids else _USE])


def _model_rows(card: ModelCard) -> dict[str, str]:
    arch = card.architecture
    return {
        "Parameters": f"{arch.num_parameters(card.vocab_size):,}",
        "Layers": str(arch.layers),
        "Hidden size": str(arch.hidden_size),
        "Heads (query, key-value)": f"{arch.heads}, {arch.kv_heads}",
        "Feed-forward size": str(arch.ffn_hidden_size),
        "Embeddings": "input and output shared" if arch.tie_embeddings else "input and output separate",
        "Vocabulary": f"{card.vocab_size:,}",
        "Context": f"{max(card.context or 0, card.sequence_length):,} tokens",
        "Trained in": card.precision.value,
    }


def _training_rows(history: Path) -> dict[str, str]:
    records = [json.loads(line) for line in history.read_text().splitlines()]
    rows = {"Steps": f"{records[-1]['step']:,}", "Tokens": f"{records[-1]['tokens']:,}"}
    # Skipped steps have no loss.
    for figure, label in (("loss", "Final training loss"), ("validation_loss", "Final validation loss")):
        if measured := [r[figure] for r in records if figure in r]:
            rows[label] = f"{measured[-1]:.4f} nats"
    return rows


def _lineage(resolved: ResolvedStage, ancestors: Sequence[Artifact]) -> list[str]:
    """A stage's hash identifies its request, its digest its result; inputs are digests of rows above."""
    rows = [_ancestor(a.stage, a.kind.value, a.hash, a.inputs, digest=a.digest) for a in ancestors]
    inputs = {slot: ref.digest for slot, ref in resolved.inputs.items()}
    rows.append(_ancestor(resolved.stage.name, "this folder", resolved.hash, inputs, digest=None))
    head = [f"Run `{resolved.run}`, seed {resolved.seed}.", "", "| stage | produces | hash | inputs | digest |"]
    return [*head, "|---|---|---|---|---|", *rows]


def _ancestor(stage: str, gives: str, stage_hash: str, inputs: dict[str, str], *, digest: str | None) -> str:
    read = "<br>".join(f"{slot} `{found[:12]}`" for slot, found in inputs.items())
    return f"| {stage} | {gives} | `{stage_hash}` | {read} | {f'`{digest}`' if digest else ''} |"


def _rows(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""]
