"""The exported folder is the trained model: equal logits, text and perplexity."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace_api.artifact import Artifact, ArtifactRef
from headrace_api.contract import ResolvedStage
from headrace_api.stages.export import ExportDtype
from headrace_trainer import artifacts
from headrace_trainer.formats.huggingface.names import to_huggingface
from headrace_trainer.formats.model_card import read_card
from headrace_trainer.formats.tokenizer import END_OF_TEXT, save_tokenizer
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.export import run
from headrace_trainer.stages.export import stage as export_stage
from headrace_trainer.stages.export.lineage import lineage
from headrace_trainer.stages.export.parity import check_export
from headrace_trainer.stages.export.weights import read_weights
from headrace_trainer.storage import DirectoryStore, open_store
from trainer.engine.gangs import TP1, TP2, TP2_PP2, Run, gang, resolved, train
from trainer.export.ranks import CONTINUATION, PROMPTS, VOCAB, Windows, ask_megatron, megatron_loss


@dataclass(frozen=True)
class Exported:
    """A model that was trained a few real steps, and its export."""

    trained: Path
    model: str
    """Digest of what was trained."""
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
            "hash": "c" * 64,
            "inputs": {"model": ref.dump()},
            "outputUri": f"{stage.storage.uri}/ship",
        }
    )
    ctx = StageContext(resolved=export, scratch=folder / "scratch-export")
    return Exported(trained=trained, model=made.digest, folder=ctx.output, metrics=run(ctx))


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
    generation = json.loads((exported.folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["do_sample"], generation["temperature"]) == (0, True, 0.8)
    # Servers take a length from here for every request's, and warn of each that names another.
    assert not {"max_length", "max_new_tokens"} & generation.keys()


def test_the_card_tells_what_the_artifacts_tell(exported):
    card = (exported.folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert f"| Parameters | {int(exported.metrics['parameters']):,} |" in card
    last = json.loads((exported.trained / "history.jsonl").read_text().splitlines()[-1])
    assert f"| Steps | {last['step']} |" in card
    assert f"| Tokens | {last['tokens']:,} |" in card
    assert f"| Final training loss | {last['loss']:.4f} nats |" in card
    made = exported.model
    assert f"| pretrain | checkpoint | `{'a' * 64}` | shards `{'d' * 12}` | `{made}` |" in card
    assert f"| ship | this folder | `{'c' * 64}` | model `{made[:12]}` |  |" in card


def test_the_card_shows_how_to_use_it(exported, capsys):
    card = (exported.folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("<this folder>", str(exported.folder))
    exec(code, {})
    printed = capsys.readouterr().out
    assert printed.startswith("Once upon a time")
    assert len(printed) > len("Once upon a time\n")


def test_large_models_are_written_as_several_files(exported, tmp_path, monkeypatch):
    shutil.copytree(exported.folder, tmp_path / "ship", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(export_stage, "_LARGEST_FILE", "100KB")
    card = read_card(exported.trained)
    tensors = to_huggingface(read_weights(exported.trained / "checkpoint"), card)
    export_stage.write_model(tmp_path / "ship", tensors, card, dtype=ExportDtype.FP32)
    assert len(list((tmp_path / "ship").glob("model-*-of-*.safetensors"))) > 2
    check_export(tmp_path / "ship", tensors)


def test_bf16_halves_the_file(tmp_path):
    small = _export(tmp_path, TP1, dtype="bf16")
    size = (small.folder / "model.safetensors").stat().st_size
    assert size < 2.2 * small.metrics["parameters"]
    assert AutoModelForCausalLM.from_pretrained(small.folder).dtype == torch.bfloat16


def broken(exported: Exported, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the export with other weights."""
    shutil.copytree(exported.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["model.norm.weight"].add_(1), r"weights differ after reloading: model\.norm\.weight"),
        (lambda t: t["model.norm.weight"].zero_(), r"weights are zero: model\.norm\.weight"),
        (lambda t: t.pop("model.norm.weight"), "transformers cannot load the export: .*missing_keys.*norm"),
        (lambda t: t.update(other=torch.ones(1)), "transformers cannot load the export: .*unexpected_keys.*other"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "weights differ after reloading"),
    ],
    ids=["changed", "zero", "missing", "unexpected", "not finite"],
)
def test_the_gate_finds_what_is_wrong(exported, tmp_path, change, said):
    right = load_file(exported.folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=said):
        check_export(broken(exported, tmp_path / "broken", change), right)


def test_the_gate_finds_logits_that_are_not_finite(exported, tmp_path):
    folder = broken(exported, tmp_path / "broken", lambda t: t["model.norm.weight"].fill_(float("inf")))
    with pytest.raises(RuntimeError, match="logits are not finite"):
        check_export(folder, load_file(folder / "model.safetensors"))


def test_lineage_is_what_is_behind_an_artifact_and_nothing_else(tmp_path):
    store = DirectoryStore(tmp_path)

    def finish(stage: str, kind: str, second: int, **inputs: str) -> Artifact:
        artifact = Artifact(
            kind=kind, run="r", stage=stage, hash=stage * 8, inputs=inputs, duration_seconds=1,
            created_at=datetime(2026, 1, 1, 0, 0, second, tzinfo=UTC),
        )  # fmt: skip
        store.put_bytes(f"{stage}/artifact.json", artifact.model_dump_json(by_alias=True).encode())
        return artifact

    corpus = finish("corpus", "corpus", 1)
    tokenizer = finish("tok", "tokenizer", 2, corpus=corpus.digest)
    shards = finish("tokens", "shards", 3, corpus=corpus.digest, tokenizer=tokenizer.digest)
    model = finish("base", "checkpoint", 4, shards=shards.digest)
    finish("other", "checkpoint", 5, shards="gone")
    store.put_bytes("base/checkpoints/artifact.json", b"not a manifest")
    ref = ArtifactRef(uri=f"{tmp_path}/base", digest=model.digest, kind=model.kind)
    assert [a.stage for a in lineage(store, ref)] == ["corpus", "tok", "tokens", "base"]
