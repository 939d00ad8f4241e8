"""The model itself: the same start under every layout, the same function as transformers' Llama, no sign of padding."""

from pathlib import Path
from typing import Any

import pytest

from headrace_api.model import Architecture
from trainer.engine.gangs import LENGTH, PP2, TP1, TP2, Run, Synthetic, gang

VOCAB = 250
SHAPE = Architecture(layers=4, hidden_size=64, heads=4, kv_heads=2, ffn_hidden_size=96)
TIED = SHAPE.model_copy(update={"tie_embeddings": True, "rope_base": 500_000.0, "norm_epsilon": 1e-6})


def save_start(
    rank: int, world: int, layout: dict[str, int], architecture: Architecture, folder: Path, seed: int
) -> None:
    """Build the model of one rank and write its start weights."""
    from headrace_trainer.engine.checkpoint.state import save_weights

    with built(rank, layout, architecture, seed=seed) as (_, model):
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
    from headrace_api.stages.training import Precision
    from headrace_trainer.engine.model.build import build_model
    from headrace_trainer.engine.model.start import fill_start_weights
    from headrace_trainer.engine.parallel import join_gang

    @contextmanager
    def both() -> Any:
        with join_gang(Layout(**layout), rank=rank, seed=seed) as ranks:
            model = build_model(
                architecture, gang=ranks, vocab_size=VOCAB, sequence_length=LENGTH, precision=Precision.FP32
            )
            fill_start_weights(model, architecture, seed=seed)
            yield ranks, model

    return both()


def start_weights(folder: Path, layout: dict[str, int], architecture: Architecture, *, seed: int = 7) -> dict[str, Any]:
    """Global tensors of the start weights under a layout, read without Megatron."""
    ended = gang(save_start, layout["tensor"] * layout["pipeline"], layout, architecture, folder, seed)
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

    llama = transformers_llama(weights, architecture)
    samples = torch.from_numpy(np.stack(two_samples()))
    with torch.no_grad():
        logits = llama(samples[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), samples[:, 1:], reduction="none")
    return losses.tolist()  # type: ignore[no-any-return]


def transformers_llama(weights: dict[str, Any], architecture: Architecture) -> Any:
    """transformers' Llama with the same weights, cut to the real vocabulary."""
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
    return llama


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


def hidden_lengths(rank: int, world: int, layout: dict[str, int], length: int) -> int:
    """Positions that a layer hands to the next one on this rank."""
    import torch

    from headrace_api.parallelism import Layout
    from headrace_api.stages.training import Precision
    from headrace_trainer.engine.model.build import build_model
    from headrace_trainer.engine.model.start import fill_start_weights
    from headrace_trainer.engine.parallel import join_gang

    seen: list[int] = []
    with join_gang(Layout(**layout), rank=rank) as ranks:
        model = build_model(SHAPE, gang=ranks, vocab_size=VOCAB, sequence_length=length, precision=Precision.FP32)
        fill_start_weights(model, SHAPE, seed=1)
        model.decoder.layers[0].register_forward_hook(lambda _layer, _given, gives: seen.append(gives[0].size(0)))
        tokens = torch.zeros(1, length, dtype=torch.long)
        model(tokens, torch.arange(length)[None], None, labels=tokens)
    return seen[0]


@pytest.mark.parametrize(("layout", "length", "expected"), [(TP1, 32, 32), (TP2, 32, 16), (TP2, 33, 33)])
def test_tensor_ranks_share_a_sequence_that_can_be_divided(layout: dict[str, int], length: int, expected: int) -> None:
    ended = gang(hidden_lengths, layout["tensor"], layout, length)
    assert [e.value for e in ended] == [expected] * layout["tensor"], ended


def attention_refusals(rank: int, world: int) -> dict[str, str]:
    """What is said to each thing that attention cannot do."""
    import torch

    from headrace_trainer.engine.device.megatron import AttnMaskType, PackedSeqParams, TransformerConfig
    from headrace_trainer.engine.model.attention import CausalAttention

    said = {}

    def attend(
        name: str, *, given: dict[str, Any] | None = None, built_with: dict[str, Any] | None = None, **config: Any
    ) -> None:
        settings = {"attention_dropout": 0.0, **config}
        kinds = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", **(built_with or {})}
        q = torch.ones(4, 1, 2, 8)
        inputs = {"k": q, "v": q, "attention_mask": None, **(given or {})}
        try:
            CausalAttention(
                TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, **settings),
                layer_number=1,
                **kinds,
            )(q, **inputs)
        except NotImplementedError as error:
            said[name] = str(error)

    attend("plain")
    attend("causal", given={"attn_mask_type": AttnMaskType.causal})
    attend("bias", given={"attention_bias": torch.zeros(1, 2, 4, 4)})
    ends = torch.tensor([0, 4], dtype=torch.int32)
    attend("format", given={"packed_seq_params": PackedSeqParams(qkv_format="bshd", cu_seqlens_q=ends)})
    spread = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_q_padded=ends)
    attend("spread", given={"packed_seq_params": spread})
    documents = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends)
    hidden = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    attend("masked pack", given={"packed_seq_params": documents, "attention_mask": hidden})
    attend("padding", given={"attn_mask_type": AttnMaskType.padding})
    attend("all keys", given={"attn_mask_type": AttnMaskType.no_mask})
    attend("cache", given={"k": torch.ones(9, 1, 2, 8), "v": torch.ones(9, 1, 2, 8)})
    attend("not causal", built_with={"attn_mask_type": AttnMaskType.no_mask})
    attend("cross", built_with={"attention_type": "cross"})
    attend("dropout", attention_dropout=0.1)
    attend("window", window_size=(2, 0))
    attend("sinks", softmax_type="off-by-one")
    return said


def test_attention_refuses_what_it_would_ignore() -> None:
    (ended,) = gang(attention_refusals, 1)
    assert ended.value == {
        "bias": "attention with an attention bias: not supported",
        "format": "attention with packs in the format 'bshd': not supported",
        "spread": "attention with padding between documents: not supported",
        "masked pack": "attention with a mask over packs: not supported",
        "all keys": "attention with a mask of type 'no_mask': not supported",
        "padding": "attention with a mask of type 'padding': not supported",
        "cache": "attention with several queries after cached keys: not supported",
        "not causal": "attention with a mask of type 'no_mask': not supported",
        "cross": "attention with type 'cross': not supported",
        "dropout": "attention with dropout: not supported",
        "window": "attention with a window: not supported",
        "sinks": "attention with softmax_type 'off-by-one': not supported",
    }, ended


def fp8_settings(rank: int, world: int, recipe: str | None) -> tuple[Any, ...]:
    from headrace_api.parallelism import Layout
    from headrace_api.stages.training import Fp8Recipe, Precision
    from headrace_trainer.engine.model.build import transformer_config

    config = transformer_config(
        SHAPE,
        layout=Layout(**TP1),
        sequence_length=LENGTH,
        precision=Precision.FP8 if recipe else Precision.BF16,
        fp8_recipe=Fp8Recipe(recipe or "delayed"),
    )
    return config.fp8, config.fp8_recipe if recipe else None, config.fp8_amax_history_len


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("delayed", ("hybrid", "delayed", 1024)),
        ("tensorwise", ("hybrid", "tensorwise", 1)),
        ("blockwise", ("hybrid", "blockwise", 1)),
        (None, (None, None, 1)),
    ],
)
def test_megatron_is_told_the_fp8_recipe(recipe: str | None, expected: tuple[Any, ...]) -> None:
    (ended,) = gang(fp8_settings, 1, recipe)
    assert ended.value == expected, ended
