"""The losses and gradient norms of 20 steps are TRL's: same model, same tokens, same order."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from headrace_api.stages.export import ExportDtype
from headrace_trainer.formats.dataset import Dataset
from headrace_trainer.formats.huggingface.names import to_huggingface
from headrace_trainer.formats.model_card import read_card
from headrace_trainer.formats.packs import Packing, PackOrder
from headrace_trainer.stages.export.stage import write_model
from headrace_trainer.stages.export.weights import read_weights
from trainer.data.builders import finish, make_context
from trainer.engine.gangs import gang
from trainer.posttrain.chain import Base, history, pretrained, reference, resolved, stage_rank, write_records
from trainer.posttrain.test_dpo import pairs
from trainer.posttrain.test_sft import conversations

STEPS, BATCH, LENGTH = 20, 8, 128
FIGURES = [f"{of}/{which}" for of in ("rewards", "logps") for which in ("chosen", "rejected", "margins")] + [
    "kl",
    "log_odds_ratio",
    "log_odds_chosen",
    "nll_loss",
]
"""What TRL records as well, by its names."""
RATE = 1e-3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"))


LOSSES: dict[str, dict[str, Any]] = {
    "orpo": {"beta": 0.5},
    "simpo": {"beta": 2.0, "gamma": 0.6},
    "kto": {"beta": 0.3, "desirableWeight": 1.5, "undesirableWeight": 0.75},
}
"""Losses of dpo that have trainers of their own in TRL."""


def equally_long(base: Base, count: int) -> list[dict[str, Any]]:
    """Pairs without a prompt, whose chosen sides all have the same number of tokens.

    TRL's ORPO takes the likelihood of the prompt too, and its mean over the tokens of a batch; the paper, and this stage,
    that of the answer, as a mean over answers. Here both are the same.
    """
    tokenizer = Tokenizer.from_file(str(Path(base.model.uri) / "tokenizer/tokenizer.json"))
    draw, words = random.Random(0), set[str]()
    while len(words) < 2 * count:
        word = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randrange(6, 11)))
        if len(tokenizer.encode(word, add_special_tokens=False).ids) == 6:
            words.add(word)
    both = sorted(words)
    return [{"chosen": a, "rejected": b} for a, b in zip(both[:count], reversed(both[count:]), strict=True)]


def labelled(count: int) -> list[dict[str, Any]]:
    """One side of each pair."""
    draw = random.Random(2)
    sides = [draw.choice(("chosen", "rejected")) for _ in range(count)]
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair, side in zip(pairs(count), sides, strict=True)
    ]


def records_of(kind: str, base: Base) -> list[dict[str, Any]]:
    count = STEPS * BATCH
    match kind:
        case "sft":
            return conversations(count)
        case "orpo":
            return equally_long(base, count)
        case "kto":
            return labelled(count)
        case _:
            return pairs(count)


def block(data: Path, **fields: Any) -> dict[str, Any]:
    return {
        "from": {"model": "base"},
        "data": {"sources": [{"uri": str(data)}]},
        "sequenceLength": LENGTH,
        "globalBatchSize": BATCH,
        "microBatchSize": 4,
        "packing": False,
        "precision": "fp32",
        "schedule": {"learningRate": RATE, "warmup": 0, "decay": "constant"},
    } | fields


def exported(base: Base, folder: Path, model: Any) -> Path:
    """A model as transformers loads it."""
    config = {"from": {"model": "sft"}}
    ctx = make_context(folder, kind="export", config=config, storage=base.storage, inputs={"model": model})
    finish(ctx)
    return ctx.output


def in_order(scratch: Path) -> list[Any]:
    """The units of a stage, as its steps took them."""
    units = Dataset.open(scratch / "data").train
    order = PackOrder(units.lengths, capacity=LENGTH, seed=3, packing=Packing.NONE)
    found = [units[int(order.units(i)[0])] for i in range(STEPS * BATCH)]
    sides = [[{"tokens": d.tokens.tolist(), "mask": d.mask.tolist(), "label": d.label} for d in unit] for unit in found]
    return [side[0] if len(side) == 1 else side for side in sides]


def by_trl(folder: Path, **task: Any) -> dict[str, list[float]]:
    shared = {"folder": str(folder / "trl"), "batch": BATCH, "steps": STEPS, "learning_rate": RATE, "length": LENGTH}
    (folder / "task.json").write_text(json.dumps(shared | task))
    program = Path(__file__).with_name("trl_oracle.py")
    done = subprocess.run([sys.executable, program, folder / "task.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", *LOSSES])
def test_twenty_steps_are_trls(base: Base, tmp_path: Path, kind: str) -> None:
    storage = base.storage.model_copy(update={"uri": str(tmp_path / "storage")})
    data = write_records(tmp_path / "data.jsonl", records_of(kind, base))
    of = "dpo" if kind in LOSSES else kind
    options = {"loss": kind, **LOSSES[kind]} if kind in LOSSES else {}

    def train(name: str, **fields: Any) -> Any:
        stage = resolved(storage, name, {of: block(data, **options, **fields)}, inputs={"model": base.model})
        (ended,) = gang(stage_rank, 1, stage, tmp_path)
        assert not ended.error, ended
        return stage, ended

    stage, _ = train(kind)
    # A rate at which no weight changes: the model with its grown vocabulary and new head, before the first step.
    start, ended = train("start", schedule={"learningRate": 1e-30, "warmup": 0, "decay": "constant"})
    task: dict[str, Any] = {"kind": kind, "examples": in_order(tmp_path / f"scratch-{kind}-1")}
    names = {"desirableWeight": "desirable_weight", "undesirableWeight": "undesirable_weight"}
    task |= {names.get(name, name): value for name, value in options.items()}
    task["figures"] = FIGURES
    if kind == "reward":
        # The body of the start as a language model: its output layer plays no part.
        weights = read_weights(Path(start.output_uri) / "checkpoint")
        task["head"] = weights.pop("scalar_head.weight").tolist()
        weights["output_layer.weight"] = weights["embedding.word_embeddings.weight"]
        card = read_card(Path(start.output_uri))
        (tmp_path / "hf").mkdir()
        write_model(tmp_path / "hf", to_huggingface(weights, card), card, dtype=ExportDtype.FP32)
        shutil.copytree(Path(start.output_uri) / "tokenizer", tmp_path / "hf", dirs_exist_ok=True)
        task["model"] = str(tmp_path / "hf")
    else:
        task["model"] = str(exported(base, tmp_path, reference(start, ended)))
    found, ours = by_trl(tmp_path, **task), history(stage)
    assert len(found["losses"]) == len(ours) == STEPS
    assert [r["loss"] for r in ours] == pytest.approx(found["losses"], abs=1e-4, rel=0)
    assert [r["grad_norm"] for r in ours] == pytest.approx(found["norms"], abs=1e-4, rel=1e-4)
    for figure in FIGURES if kind in LOSSES else ():
        theirs = {i: value for i, value in enumerate(found[figure]) if value is not None}
        if figure == "nll_loss" and kind == "simpo":
            assert set(theirs.values()) == {0.0}, "CPO's likelihood, which is switched off"
            continue
        assert {i: r[figure] for i, r in enumerate(ours) if figure in r} == pytest.approx(theirs, abs=1e-3), figure
    assert sum(r["loss"] for r in ours[-3:]) < sum(r["loss"] for r in ours[:3])
