"""The exported folder is the model that was trained: the same logits, the same words, the same perplexity."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace_api.artifact import ArtifactRef
from headrace_api.contract import ResolvedStage
from headrace_trainer import artifacts
from headrace_trainer.export import run
from headrace_trainer.export.parity import check_export
from headrace_trainer.stage import StageContext
from headrace_trainer.storage import open_store
from headrace_trainer.tokenizer.files import END_OF_TEXT, save_tokenizer
from trainer.export.ranks import CONTINUATION, PROMPTS, VOCAB, Windows, ask_megatron, megatron_loss
from trainer.megatron.gangs import TP1, TP2, TP2_PP2, Run, gang, resolved, train


@dataclass(frozen=True)
class Exported:
    """A model that was trained a few real steps, and its export."""

    trained: Path
    folder: Path
    metrics: dict[str, float]


def _tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [" ".join(str(i * i) for i in range(3000))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    folder.mkdir(parents=True)
    save_tokenizer(tokenizer, folder, eod=END_OF_TEXT)


def _export(folder: Path, layout: dict[str, int], *, dtype: str = "fp32", **model: object) -> Exported:
    job = Run(folder=folder, steps=6, vocab_size=VOCAB, model=dict(model), learning_rate=1e-2)
    ended = train(job, layout)
    assert not any(e.error for e in ended), ended
    stage, trained = resolved(job, layout), folder / "scratch-1" / "output"
    _tokenizer(trained / "tokenizer")
    store = open_store(stage.storage)
    artifacts.upload_part(store, stage, trained, index=0)
    made = artifacts.commit(store, stage, metrics={}, started=0.0)
    ref = ArtifactRef(uri=stage.output_uri, digest=made.digest, kind=made.kind)
    export = ResolvedStage.model_validate(
        {
            **stage.dump(),
            "stage": {
                "name": "ship",
                "export": {"from": {"model": "pretrain"}, "dtype": dtype, "license": "apache-2.0"},
            },
            "inputs": {"model": ref.dump()},
            "outputUri": f"{stage.storage.uri}/ship",
        }
    )
    ctx = StageContext(resolved=export, scratch=folder / "scratch-export")
    return Exported(trained=trained, folder=ctx.output, metrics=run(ctx))


LAYOUTS = {"TP1": TP1, "TP2": TP2, "TP2xPP2": TP2_PP2}


@pytest.fixture(scope="module", params=["TP1", "TP2", "TP2xPP2", "tied"])
def exported(request, tmp_path_factory) -> Exported:
    folder = tmp_path_factory.mktemp("export")
    tied = request.param == "tied"
    return _export(folder, LAYOUTS.get(request.param, TP1), **({"tieEmbeddings": True} if tied else {}))


def test_logits_and_greedy_words_are_megatrons(exported):
    (ended,) = gang(ask_megatron, 1, exported.trained)
    assert not ended.error, ended
    logits, continued = ended.value
    model = AutoModelForCausalLM.from_pretrained(exported.folder)
    for prompt, expected, words in zip(PROMPTS, logits, continued, strict=True):
        with torch.no_grad():
            found = model(torch.tensor([prompt])).logits[0].numpy()
        assert np.abs(found - expected).max() < 1e-4
        generated = model.generate(
            torch.tensor([prompt]), max_new_tokens=CONTINUATION, min_new_tokens=CONTINUATION, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        assert generated[0].tolist() == words


def test_perplexity_is_equal_to_four_digits(exported):
    (ended,) = gang(megatron_loss, 1, exported.trained)
    assert not ended.error, ended
    model = AutoModelForCausalLM.from_pretrained(exported.folder)
    losses = []
    for i in range(20):
        ids = torch.from_numpy(Windows().sample(i))[None]
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits
        losses.append(float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])))
    ours, theirs = np.exp(ended.value), np.exp(np.mean(losses))
    assert f"{ours:.4g}" == f"{theirs:.4g}"


def test_the_folder_is_what_people_expect(exported):
    names = {p.name for p in exported.folder.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"} <= names
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    assert tokenizer.decode(tokenizer("Grüße, 世界!").input_ids) == "Grüße, 世界!"
    config = json.loads((exported.folder / "config.json").read_text())
    assert (config["vocab_size"], config["num_key_value_heads"], config["eos_token_id"]) == (VOCAB, 2, 0)
    card = (exported.folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert f"{int(exported.metrics['parameters']):,}" in card


def test_bf16_halves_the_file(tmp_path):
    small = _export(tmp_path, TP1, dtype="bf16")
    size = (small.folder / "model.safetensors").stat().st_size
    assert size < 2.2 * small.metrics["parameters"]
    assert AutoModelForCausalLM.from_pretrained(small.folder).dtype == torch.bfloat16


def test_the_gate_finds_what_is_missing_or_changed(exported, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(exported.folder, broken)
    tensors = load_file(broken / "model.safetensors")
    right = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"weights changed on their way: model\.norm\.weight"):
        check_export(broken, right)
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="does not load what was exported"):
        check_export(broken, right)
