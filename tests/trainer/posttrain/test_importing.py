"""Models that were trained elsewhere: the same logits here under every layout, the same bytes when they leave."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file, save_file

from headrace_api.artifact import ArtifactRef
from headrace_api.run import Storage
from headrace_trainer.errors import UserError
from headrace_trainer.formats.huggingface.configs import huggingface_config
from headrace_trainer.formats.huggingface.files import bring_pretrained
from headrace_trainer.formats.huggingface.names import to_huggingface
from headrace_trainer.formats.model_card import describe
from headrace_trainer.stages.export.weights import read_weights
from headrace_trainer.storage import open_uri
from trainer.engine.gangs import PP2, TP1, TP2, gang
from trainer.posttrain.chain import history, reference, resolved, stage_rank, write_records
from trainer.posttrain.foreign import LENGTH, MODELS, SHAPE, VOCAB, foreign_logits, imported, save_model
from trainer.posttrain.test_sft import conversations

LAYOUTS = {"TP1": TP1, "TP2": TP2, "PP2": PP2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of every kind; one is in bf16 and in several files."""
    root = tmp_path_factory.mktemp("models")
    saved = {name: save_model(root / name, name) for name in MODELS}
    return saved | {"sharded": save_model(root / "sharded", "llama", dtype=torch.bfloat16, shard="100KB")}


@pytest.fixture(scope="module", params=LAYOUTS)
def on_a_gang(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """Every model on a layout: its logits, and the folder with its weights."""
    layout, output = LAYOUTS[request.param], tmp_path_factory.mktemp(request.param)
    ended = gang(imported, layout["tensor"] * layout["pipeline"], layout, folders, output)
    assert not any(e.error for e in ended), ended
    return ended[0].value, output


def test_logits_are_those_of_transformers(on_a_gang: tuple[dict[str, Any], Path], folders: dict[str, Path]) -> None:
    logits, _ = on_a_gang
    assert len({tuple(found[0, :3]) for found in logits.values()}) == len(folders)
    for name, folder in folders.items():
        expected = foreign_logits(folder)
        assert expected.abs().max() > 1, f"{name}: says nothing"
        assert (torch.from_numpy(logits[name]) - expected).abs().max() < 1e-4, name


def test_what_is_exported_is_what_was_imported(
    on_a_gang: tuple[dict[str, Any], Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Every byte of the weights' file, where it is one, and what config.json says of the model."""
    from huggingface_hub import save_torch_state_dict

    _, output = on_a_gang
    for name, folder in folders.items():
        source = _bring(folder, tmp_path)
        card = describe(source.architecture, vocab_size=VOCAB, eod_id=1, sequence_length=LENGTH, precision="fp32")
        card = card.model_copy(update={"context": source.context, "bos_id": source.bos_id, "base": str(folder)})
        tensors = to_huggingface(read_weights(output / name), card)
        if name == "sharded":
            tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
            assert tensors.keys() == source.files.keys()
            assert all(torch.equal(source.tensor(key), tensor) for key, tensor in tensors.items())
            continue
        (tmp_path / name).mkdir()
        save_torch_state_dict(tensors, tmp_path / name)
        assert (tmp_path / name / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes(), name
        huggingface_config(card, dtype="float32").save_pretrained(tmp_path / name)
        ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / name, folder))
        different = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
        # What ends a document is the tokenizer's to say.
        assert different <= {"eos_token_id"}, {k: (ours.get(k), theirs.get(k)) for k in different}


def _bring(folder: Path, scratch: Path, storage: Storage | None = None, uri: str | None = None) -> Any:
    store = open_uri(uri or str(folder), storage or Storage())
    return bring_pretrained(store, scratch / folder.name, field="sft.base.uri", check=lambda architecture: None)


def stage(base: Path, folder: Path, layout: dict[str, int] = TP1, *, kind: str = "sft", **fields: Any) -> Any:
    data = write_records(folder / "chat.jsonl", conversations(64))
    block = {
        "base": {"uri": str(base)},
        "data": {"sources": [{"uri": str(data)}]},
        "sequenceLength": LENGTH,
        "globalBatchSize": 4,
        "microBatchSize": 2,
        "precision": "fp32",
        "schedule": {"learningRate": 3e-3},
        "parallelism": {"tensor": layout["tensor"], "pipeline": layout["pipeline"]},
    }
    world = layout["tensor"] * layout["pipeline"] * layout["data"]
    storage = Storage(uri=str(folder / "storage"))
    return resolved(storage, kind, {kind: block | fields}, inputs={}, ranks=world)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen3 with wide heads", {}),
        ("gemma", {}),
        ("qwen2, tied", {"adapter": {"lora": {"rank": 8}}, "schedule": {"learningRate": 3e-2}}),
    ],
    ids=["qwen3", "gemma", "qwen2 with an adapter"],
)
def test_a_stage_trains_an_imported_model_alike_on_one_rank_and_on_two_and_exports_it(
    folders: dict[str, Path], tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    losses = []
    for layout in (TP1, TP2):
        folder = tmp_path / str(layout["tensor"])
        sft = stage(folders[name], folder, layout, **fields)
        ended = gang(stage_rank, sft.stage.compute.world, sft, folder)
        assert not any(e.error for e in ended), ended
        losses.append([record["loss"] for record in history(sft)])
    # Steps this large amplify the last bits, in which sums over two ranks differ.
    assert losses[1][:8] == pytest.approx(losses[0][:8], abs=1e-4)
    assert losses[0][-1] < losses[0][0] - 1
    _export(folder, reference(sft, ended[0]), folders[name])


def test_pairs_are_scored_and_preferred_by_imported_models(folders: dict[str, Path], tmp_path: Path) -> None:
    """A new head on tied embeddings in two stages, and a reference that is the model as it was imported."""
    pairs = [{"prompt": f"Spell {i}", "chosen": f"{i}!", "rejected": f"{i} {i}"} for i in range(64)]
    data = {"sources": [{"uri": str(write_records(tmp_path / "pairs.jsonl", pairs))}]}
    for kind, layout, name in (("reward", PP2, "gemma"), ("dpo", TP1, "qwen2, tied")):
        tuned = stage(folders[name], tmp_path / kind, layout, kind=kind, data=data)
        ended = gang(stage_rank, tuned.stage.compute.world, tuned, tmp_path / kind)
        assert not any(e.error for e in ended), ended
        losses = [record["loss"] for record in history(tuned)]
        assert losses[-1] < losses[0] - 0.1
        assert kind == "reward" or losses[0] == pytest.approx(math.log(2), abs=1e-4)


def _export(folder: Path, model: ArtifactRef, base: Path) -> None:
    """Export what a stage left: the stage reloads it and compares."""
    block = {"export": {"from": {"model": "sft"}, "dtype": "fp32"}}
    ship = resolved(Storage(uri=str(folder / "storage")), "ship", block, inputs={"model": model})
    (ended,) = gang(stage_rank, 1, ship, folder)
    assert not ended.error, ended
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (Path(ship.output_uri), base))
    assert ours["architectures"] == theirs["architectures"]
    template = Path(base / "chat_template.jinja").read_text()
    config = json.loads((Path(ship.output_uri) / "tokenizer_config.json").read_text())
    assert config["chat_template"] == template
    assert str(base) in (Path(ship.output_uri) / "README.md").read_text()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "mixtral"}, "model_type: 'mixtral': is not trained here: start from a model of the type llama"),
    ("llama", {"num_local_experts": 8}, "num_local_experts: 8: mixtures of experts"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu': a llama model's is silu here"),
    ("llama", {"attention_bias": True}, "attention_bias: True: these biases"),
    ("llama", {"mlp_bias": True}, "mlp_bias: True: these biases"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "only the types default, linear"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantized weights cannot be trained"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0: capped logits"),
    ("qwen2, tied", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "use_sliding_window: True: sliding windows"),
    ("qwen2, tied", {"model_type": "llama"}, "which a llama model has not"),
    ("llama", {"model_type": "qwen2"}, "its files lack model.layers.0.self_attn.k_proj.bias"),
    ("llama", {"hidden_size": "wide"}, "config.json: transformers cannot read it"),
    ("llama", {"num_hidden_layers": 0}, "config.json: "),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads: 0: must divide"),
    ("llama", {"intermediate_size": 128}, "mlp.gate_proj.weight is [96, 64], and by config.json [128, 64]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED, ids=[said for _, _, said in REFUSED])
def test_what_cannot_be_trained_is_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    folder = _copy(folders[name], tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "layer_types"}))
    with pytest.raises(UserError) as refused:
        _bring(folder, tmp_path)
    assert str(refused.value).startswith(f"sft.base.uri: '{folder}': ")
    assert said in str(refused.value)


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    config = (target / "config.json").read_text()
    (target / "config.json").unlink()
    (target / "config.json").write_text(config)
    return target


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_is_missing_or_cut_off_is_named(folders: dict[str, Path], tmp_path: Path, file: str) -> None:
    folder = _copy(folders["llama"], tmp_path / "changed")
    whole = (folder / file).read_bytes()
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"found no {file}"):
        _bring(folder, tmp_path)
    if file == "model.safetensors":
        (folder / file).write_bytes(whole[:-100])
        with pytest.raises(UserError, match=r"model\.safetensors: cannot be read as safetensors"):
            _bring(folder, tmp_path)


def test_an_index_that_names_other_files_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(folders["sharded"], tmp_path / "changed")
    index = folder / "model.safetensors.index.json"
    index.unlink()
    for weight_map, said in (({"x": "../outside"}, r"found no \.\./outside"), ([], "names no files in weight_map")):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=said):
            _bring(folder, tmp_path)


def test_weights_in_another_number_format_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(folders["llama"], tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="is F8_E4M3: start from weights in bf16, fp16 or fp32"):
        _bring(folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        (
            "mistral with wide heads and a long window",
            {"sequenceLength": 64},
            "sft.sequenceLength: 64: must be at most 48",
        ),
        ("llama", {"parallelism": {"pipeline": 4}}, "sft.parallelism.pipeline: 4: must divide the model's 2 layers"),
    ],
)
def test_a_stage_that_does_not_fit_the_model_is_refused_before_records_are_read(
    folders: dict[str, Path], tmp_path: Path, name: str, fields: dict[str, Any], said: str
) -> None:
    from headrace_trainer.engine.finetune import prepare
    from headrace_trainer.formats.records import SFT_SHAPES
    from headrace_trainer.stage import StageContext

    layout = {**TP1, "pipeline": fields.get("parallelism", TP1)["pipeline"]}
    sft = stage(folders[name], tmp_path, layout, **fields)
    (tmp_path / "chat.jsonl").unlink()
    ctx = StageContext(resolved=sft, scratch=tmp_path / "scratch")
    with pytest.raises(UserError) as refused:
        prepare(ctx, ctx.config, allowed=SFT_SHAPES)
    assert said in str(refused.value)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Storage, str]]:
    """A real HTTP server that speaks S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    storage = Storage(uri="s3://models", endpoint=f"http://{host}:{port}")
    boto3.client("s3", endpoint_url=storage.endpoint, region_name="us-east-1").create_bucket(Bucket="models")
    yield storage, "s3://models/llama"
    server.stop()


def test_a_folder_in_a_bucket_is_the_same_model(
    folders: dict[str, Path], tmp_path: Path, bucket: tuple[Storage, str]
) -> None:
    storage, uri = bucket
    store = open_uri(uri, storage)
    for path in folders["sharded"].iterdir():
        store.put_file(path.name, path)
    there = _bring(folders["sharded"], tmp_path / "there", storage, uri)
    here = _bring(folders["sharded"], tmp_path / "here")
    assert there.folder == tmp_path / "there" / "sharded"
    assert (there.digest, there.architecture) == (here.digest, here.architecture)


def test_other_weights_are_another_model(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(folders["llama"], tmp_path / "changed")
    before = _bring(folder, tmp_path / "1").digest
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert _bring(folder, tmp_path / "2").digest != before


def test_old_forms_of_config_json_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """As Llama 3.1, Gemma and Mistral were published: rope_scaling, hidden_act gelu, no head_dim."""
    from headrace_trainer.formats.huggingface.configs import architecture_from

    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    llama = architecture_from(
        {**SHAPE, "model_type": "llama", "rope_theta": 500000.0, "rope_scaling": scaling, "pretraining_tp": 1}
    )
    assert (llama.rope_base, llama.rope_scaling and llama.rope_scaling.factor) == (500_000.0, 8.0)
    old = architecture_from({**SHAPE, "model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert (old.rope_base, old.rope_scaling and old.rope_scaling.kind) == (10_000.0, "linear")
    gemma = architecture_from({**SHAPE, "model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None})
    assert (gemma.head_dim, gemma.tie_embeddings) == (256, True)
    assert architecture_from({**SHAPE, "model_type": "mistral", "sliding_window": None}).window is None
