"""Tiny models of every family as transformers saves them, and what ranks do with them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCAB, LENGTH = 300, 48
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with llama3 scaling": ("llama", {"rope_parameters": _LLAMA3, "num_key_value_heads": 4}),
    "llama with linear scaling, tied": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, "tie_word_embeddings": True},
    ),
    "mistral with wide heads and a long window": ("mistral", {"head_dim": 32, "sliding_window": LENGTH}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen3 with wide heads": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 32}),
}
"""Name -> transformers' type of the model, and what is special about it."""


def save_model(
    folder: Path, name: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **fields: Any
) -> Path:
    """A model with random weights, none of them 0 or 1, and a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, special = MODELS[name]
    torch.manual_seed(len(name))
    config = AutoConfig.for_model(kind, **{**SHAPE, **special, **fields})
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with a template that says who speaks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bytewise.train_from_iterator(["Spell lamp and storm"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ message['role'] + ': ' + message['content'] }}{% endif %}{% endfor %}"
    )
    fast.save_pretrained(folder)


def tokens() -> torch.Tensor:
    """[1, LENGTH]: a document that is longer than the context that llama3's scaling speaks of."""
    return torch.from_numpy(np.random.default_rng(5).integers(0, VOCAB, (1, LENGTH)))


def foreign_logits(folder: Path) -> torch.Tensor:
    """What transformers says of ``tokens``: [LENGTH, VOCAB]."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(tokens()).logits[0]
    return logits


def imported(rank: int, world: int, layout: dict[str, int], folders: dict[str, Path], output: Path | None) -> Any:
    """Logits of ``tokens`` from every folder's model on a gang, [LENGTH, VOCAB]; its weights go below ``output``."""
    from headrace_api.parallelism import Layout
    from headrace_api.run import Storage
    from headrace_api.stages.training import Precision
    from headrace_trainer.engine.checkpoint.state import save_weights
    from headrace_trainer.engine.device.megatron import tensor_parallel
    from headrace_trainer.engine.forward import forward_passes
    from headrace_trainer.engine.model.build import build_model
    from headrace_trainer.engine.model.importing import load_pretrained
    from headrace_trainer.engine.model.start import fill_start_weights
    from headrace_trainer.engine.packed import collate
    from headrace_trainer.engine.parallel import join_gang
    from headrace_trainer.formats.huggingface.files import bring_pretrained
    from headrace_trainer.formats.packs import Document, Pack
    from headrace_trainer.storage import open_uri

    found = {}
    ids = tokens()[0].numpy()
    pack = Pack(documents=(Document(tokens=ids, mask=np.arange(LENGTH) > 0),))
    with join_gang(Layout(**layout), rank=rank, local_rank=rank, local_world=world, seed=1) as gang:
        for name, folder in folders.items():
            source = bring_pretrained(
                open_uri(str(folder), Storage()),
                folder.parent / f"{folder.name} on {rank} of {world}",
                field="x",
                check=lambda architecture: None,
            )
            model = build_model(
                source.architecture, gang=gang, vocab_size=VOCAB, sequence_length=LENGTH, precision=Precision.FP32
            )
            fill_start_weights(model, source.architecture, seed=1)
            load_pretrained(model, source)
            row = collate(pack, length=LENGTH, device=gang.device)

            def whole(logits: torch.Tensor) -> torch.Tensor:
                return tensor_parallel.gather_from_tensor_model_parallel_region(logits[0])

            logits = forward_passes(model.eval(), [row], lambda m, r: (r.run(m), whole), shape=(LENGTH, 1024))
            found[name] = logits[0, :, :VOCAB].numpy()
            if output is not None:
                save_weights(model, output / name)
    return found
