"""The model itself: the same start under every layout, the same function as transformers' Llama, no sign of padding."""

from pathlib import Path
from typing import Any

import pytest

from headrace_api.model import Architecture
from trainer.engine.gangs import LENGTH, PP2, TP1, TP2, Run, Synthetic, gang

VOCAB = 250
SHAPE = Architecture(layers=4, hidden_size=64, heads=4, kv_heads=2, ffn_hidden_size=96)
TIED = SHAPE.model_copy(update={"tie_embeddings": True, "rope_base": 500_000.0, "norm_epsilon": 1e-6})


def save_start(rank: int, world: int, layout: dict[str, int], architecture: Architecture, folder: Path) -> None:
    """Build the model of one rank and write its start weights."""
    from headrace_trainer.engine.checkpoint.state import save_weights

    with built(rank, layout, architecture) as (_, model):
        save_weights(model, folder)


def token_losses(rank: int, world: int, layout: dict[str, int], architecture: Architecture, folder: Path) -> Any:
    """Load weights, and give the loss of every token of two samples."""
    import numpy as np
    import torch

    from headrace_trainer.engine.checkpoint.state import load_weights

    with built(rank, layout, architecture, seed=99) as (_, model), torch.no_grad():
        load_weights(model, folder)
        samples = torch.from_numpy(np.stack(two_samples()))
        losses = model(samples[:, :-1], torch.arange(LENGTH).expand(2, -1), None, labels=samples[:, 1:].contiguous())
        return losses.tolist()


def two_samples() -> list[Any]:
    source = Synthetic(Run(folder=Path(), vocab_size=VOCAB))
    return [source.sample(0), source.sample(1)]


def built(rank: int, layout: dict[str, int], architecture: Architecture, *, seed: int = 7) -> Any:
    """Process groups and a model inside them."""
    from contextlib import contextmanager

    from headrace_api.parallelism import Layout
    from headrace_api.stages.pretrain import Precision
    from headrace_trainer.engine.model.build import build_model
    from headrace_trainer.engine.parallel import join_gang

    @contextmanager
    def both() -> Any:
        with join_gang(Layout(**layout), rank=rank, seed=seed) as ranks:
            yield (
                ranks,
                build_model(
                    architecture,
                    gang=ranks,
                    vocab_size=VOCAB,
                    sequence_length=LENGTH,
                    precision=Precision.FP32,
                    seed=seed,
                ),
            )

    return both()


def start_weights(folder: Path, layout: dict[str, int], architecture: Architecture) -> dict[str, Any]:
    """Global tensors of the start weights under a layout, read without Megatron."""
    ended = gang(save_start, layout["tensor"] * layout["pipeline"], layout, architecture, folder)
    assert not any(e.error for e in ended), ended
    return read_tensors(folder)


def read_tensors(folder: Path) -> dict[str, Any]:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata.items()
    found = {
        k: torch.empty(e.size, dtype=e.properties.dtype) for k, e in entries if isinstance(e, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


@pytest.mark.parametrize("architecture", [SHAPE, TIED], ids=["untied", "tied"])
def test_every_layout_starts_from_the_same_bits(tmp_path: Path, architecture: Architecture) -> None:
    import torch

    one = start_weights(tmp_path / "one", TP1, architecture)
    assert ("output_layer.weight" in one) is not architecture.tie_embeddings
    for name, layout in {"tp": TP2, "pp": PP2}.items():
        other = start_weights(tmp_path / name, layout, architecture)
        assert other.keys() == one.keys()
        assert all(torch.equal(other[key], one[key]) for key in one)


@pytest.mark.parametrize("architecture", [SHAPE, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", [TP1, TP2], ids=["TP1", "TP2"])
def test_losses_are_those_of_transformers_with_an_unpadded_vocabulary(
    tmp_path: Path, architecture: Architecture, layout: dict[str, int]
) -> None:
    weights = start_weights(tmp_path, TP1, architecture)
    ended = gang(token_losses, layout["tensor"] * layout["pipeline"], layout, architecture, tmp_path)
    assert not any(e.error for e in ended), ended
    expected = transformers_losses(weights, architecture)
    for found, wanted in zip(ended[0].value, expected, strict=True):
        assert found == pytest.approx(wanted, abs=2e-6, rel=0)


def transformers_losses(weights: dict[str, Any], architecture: Architecture) -> list[list[float]]:
    """The token losses of transformers' Llama with the same weights, cut to the real vocabulary."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.ffn_hidden_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        rms_norm_eps=architecture.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rope_base},
        tie_word_embeddings=architecture.tie_embeddings,
    )
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(llama_names(weights, architecture), strict=not architecture.tie_embeddings)
    samples = torch.from_numpy(np.stack(two_samples()))
    with torch.no_grad():
        logits = llama(samples[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), samples[:, 1:], reduction="none")
    return losses.tolist()  # type: ignore[no-any-return]


def llama_names(weights: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Megatron's stacked tensors under transformers' names, written out for this test alone."""
    kv, dim, hidden = architecture.kv_heads, architecture.head_dim, architecture.hidden_size
    ratio = architecture.heads // kv
    found = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:VOCAB],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    if not architecture.tie_embeddings:
        found["lm_head.weight"] = weights["output_layer.weight"][:VOCAB]
    for i in range(architecture.layers):
        layer = {k.removeprefix("decoder.layers."): w[i] for k, w in weights.items() if "layers." in k}
        qkv = layer["self_attention.linear_qkv.weight"].view(kv, ratio + 2, dim, hidden)
        gate, up = layer["mlp.linear_fc1.weight"].chunk(2)
        parts = {
            "input_layernorm": layer["self_attention.linear_qkv.layer_norm_weight"],
            "self_attn.q_proj": qkv[:, :ratio].reshape(-1, hidden),
            "self_attn.k_proj": qkv[:, ratio].reshape(-1, hidden),
            "self_attn.v_proj": qkv[:, ratio + 1].reshape(-1, hidden),
            "self_attn.o_proj": layer["self_attention.linear_proj.weight"],
            "post_attention_layernorm": layer["mlp.linear_fc1.layer_norm_weight"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer["mlp.linear_fc2.weight"],
        }
        found |= {f"model.layers.{i}.{name}.weight": weight for name, weight in parts.items()}
    return found
