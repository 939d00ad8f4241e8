"""Adapters: what a stage trains of a model, under every layout, and what PEFT makes of what it leaves."""

import json
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from headrace_api.contract import ResolvedStage
from headrace_api.model import Architecture
from headrace_api.stages import Lora
from headrace_trainer.formats.huggingface.configs import huggingface_config
from headrace_trainer.formats.huggingface.names import to_huggingface
from headrace_trainer.formats.model_card import read_card
from headrace_trainer.stages.export.weights import read_weights
from trainer.engine.gangs import DP2, PP2, TP1, TP2, gang
from trainer.export.ranks import PROMPTS, ask_megatron
from trainer.posttrain.chain import Base, pretrained, stage_rank, trained
from trainer.posttrain.test_dpo import dpo
from trainer.posttrain.test_reward import reward
from trainer.posttrain.test_sft import sft

LORA = {"lora": {"rank": 4, "alpha": 8}}
FEW = {"lora": {"rank": 1, "alpha": 1, "targets": ["proj"]}}
"""256 numbers. Of a buffer that three replicas share, in parts of 128, the last one has padding alone."""
DP3 = {**TP1, "data": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"))


def adapted(base: Base, folder: Path, layout: dict[str, int] = TP1, **fields: Any) -> ResolvedStage:
    """A stage that trains an adapter on 200 conversations."""
    schedule = {"learningRate": 1e-2, "warmup": 2}
    return sft(base, folder, layout, **{"adapter": LORA, "schedule": schedule, "epochs": 1} | fields)


def watched_rank(rank: int, world: int, stage: ResolvedStage, folder: Path) -> dict[str, Any]:
    """One rank of an sft stage to its end; what it trained, and which weights of its base model have changed."""
    from headrace_trainer.engine import finetune

    leave, seen = finetune.leave_finetuned, {}

    def look_and_leave(ctx: Any, loop: Any, start: Any) -> Any:
        fresh = dict(start.build(loop.gang, ctx.config, seed=ctx.resolved.seed).named_parameters())
        now = dict(loop.state.model.named_parameters())
        trained = {name: p for name, p in now.items() if p.requires_grad}
        kept = {name.replace(".base.", "."): p for name, p in now.items() if name not in trained}
        seen["changed"] = [n for n, p in fresh.items() if not torch.equal(kept[n], p)]
        seen["trained"] = sum(p.numel() for p in trained.values())
        seen["gradients"] = sum(b.grad_data.numel() for b in loop.stepper.model.buffers)
        seen["moments"] = sum(
            s["exp_avg"].numel() for o in loop.state.optimizer.chained_optimizers for s in o.optimizer.state.values()
        )
        return leave(ctx, loop, start)

    finetune.leave_finetuned = look_and_leave
    stage_rank(rank, world, stage, folder)
    return seen


@pytest.fixture(scope="module")
def one_rank(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of an undisturbed stage on one rank, and what was seen of it."""
    folder = tmp_path_factory.mktemp("one")
    (ended,) = gang(watched_rank, 1, adapted(base, folder), folder)
    assert not ended.error, ended
    return folder, ended.value


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "storage/sft/history.jsonl").read_text().splitlines()]


def test_it_begins_as_its_base_and_learns(base: Base, tmp_path: Path, one_rank: tuple[Path, dict[str, Any]]) -> None:
    whole = trained(sft(base, tmp_path, epochs=0.1), tmp_path)
    losses = records(one_rank[0])
    assert losses[0]["loss_hex"] == whole[0]["loss_hex"]
    assert losses[0]["loss"] > 5
    assert sum(r["loss"] for r in losses[-4:]) / 4 < losses[0]["loss"] - 0.8


def test_only_adapters_are_trained_and_have_state(one_rank: tuple[Path, dict[str, Any]]) -> None:
    folder, seen = one_rank
    # Rank 4 of: 64 -> 128 (4 heads of 16, 2 of keys, 2 of values), 64 -> 64, 64 -> 2 x 128, 128 -> 64; two layers.
    expected = 2 * 4 * ((64 + 128) + (64 + 64) + (64 + 256) + (128 + 64))
    assert seen["changed"] == []
    assert seen["trained"] == seen["moments"] == expected
    assert expected <= seen["gradients"] < expected + 128  # a buffer is padded
    metrics = json.loads((folder / "storage/sft/artifact.json").read_text())["metrics"]
    assert metrics["trainedParameters"] == expected
    arch = Architecture(layers=2, hidden_size=64, heads=4, kv_heads=2, ffn_hidden_size=128)
    assert Lora(rank=4).num_parameters(arch) == expected


def test_checkpoints_hold_the_adapter_alone(one_rank: tuple[Path, dict[str, Any]]) -> None:
    folder, seen = one_rank
    newest = max((folder / "storage/sft/checkpoints").glob("*/*"))
    stored = FileSystemReader(str(newest)).read_metadata().state_dict_metadata
    sizes = {name: math.prod(entry.size) for name, entry in stored.items() if hasattr(entry, "size")}
    assert all(name.endswith(("lora_a", "lora_b")) for name in sizes), sizes
    assert sum(sizes.values()) == 4 * seen["trained"]  # the weights, and what the optimizer keeps


@pytest.mark.parametrize("layout", [TP2, PP2, DP2], ids=["TP2", "PP2", "DP2"])
def test_losses_do_not_depend_on_the_layout(
    base: Base, tmp_path: Path, one_rank: tuple[Path, dict[str, Any]], layout: dict[str, int]
) -> None:
    ended = gang(watched_rank, 2, adapted(base, tmp_path, layout), tmp_path)
    assert not any(e.error for e in ended), ended
    for figure in ("loss", "validation_loss", "grad_norm"):
        expected = [r[figure] for r in records(one_rank[0]) if figure in r]
        assert [r[figure] for r in records(tmp_path) if figure in r] == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert [e.value["changed"] for e in ended] == [[], []]
    ours, theirs = (load_file(f / "storage/sft/adapter/adapter_model.safetensors") for f in (tmp_path, one_rank[0]))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-4


def test_losses_do_not_depend_on_sequence_parallelism(base: Base, tmp_path: Path) -> None:
    """An odd length cannot be split over tensor ranks."""
    found = []
    for name, layout in {"one": TP1, "two": TP2}.items():
        folder = tmp_path / name
        stage = adapted(base, folder, layout, sequenceLength=63, microBatchSize=1, epochs=0.3)
        found.append(trained(stage, folder))
    assert [r["loss"] for r in found[1]] == pytest.approx([r["loss"] for r in found[0]], abs=1e-5, rel=0)


@pytest.mark.parametrize(("layout", "adapter"), [(TP2, LORA), (DP3, FEW)], ids=["TP2", "a replica with nothing"])
def test_a_killed_stage_goes_on_bit_for_bit(
    base: Base, tmp_path: Path, layout: dict[str, int], adapter: dict[str, Any]
) -> None:
    fields: dict[str, Any] = {"adapter": adapter, "globalBatchSize": 6, "epochs": 0.6}
    world = layout["tensor"] * layout["data"]
    ended = gang(watched_rank, world, adapted(base, tmp_path / "whole", layout, **fields), tmp_path / "whole")
    assert not any(e.error for e in ended), ended
    if adapter is FEW:
        assert [e.value["moments"] for e in ended] == [128, 128, 0]
    whole = records(tmp_path / "whole")
    seed = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(10**6)))
    print(f"HEADRACE_TEST_SEED={seed}")
    die_at = random.Random(seed).randrange(5, len(whole) - 1)
    killed = gang(stage_rank, world, adapted(base, tmp_path, layout, **fields), tmp_path, die_at)
    assert killed[-1].exit_code == -signal.SIGKILL
    resumed = trained(adapted(base, tmp_path, layout, attempt=2, **fields), tmp_path)
    assert [r["loss_hex"] for r in resumed] == [r["loss_hex"] for r in whole]


def logits(model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]


def apart(some: list[torch.Tensor], others: list[Any]) -> float:
    """The largest difference."""
    return max(float((a - torch.as_tensor(b)).abs().max()) for a, b in zip(some, others, strict=True))


def transformers_model(folder: Path) -> LlamaForCausalLM:
    """What export makes of a checkpoint artifact."""
    card = read_card(folder)
    model = LlamaForCausalLM(huggingface_config(card, dtype="float32"))
    model.load_state_dict(to_huggingface(read_weights(folder / "checkpoint"), card))
    return model.eval()


def test_peft_makes_of_base_and_adapter_what_was_merged(base: Base, one_rank: tuple[Path, dict[str, Any]]) -> None:
    folder = one_rank[0] / "storage/sft"
    (ended,) = gang(ask_megatron, 1, folder)
    assert not ended.error, ended
    merged = logits(transformers_model(folder))
    assert apart(merged, ended.value[0]) < 1e-4
    model = transformers_model(Path(base.model.uri))
    before = logits(model)
    # The chat template brought tokens; PEFT resizes nothing by itself, and the adapter has their rows.
    model.resize_token_embeddings(read_card(folder).vocab_size)
    adapted_model = PeftModel.from_pretrained(model, str(folder / "adapter"))
    assert apart(logits(adapted_model), merged) < 1e-4
    assert apart(before, [x[:, :400] for x in merged]) > 0.1


def test_preferences_are_held_to_the_base_model(base: Base, tmp_path: Path) -> None:
    schedule = {"learningRate": 1e-2, "warmup": 1, "decay": "constant"}
    found = trained(dpo(base, tmp_path, adapter=LORA, schedule=schedule), tmp_path)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert found[-1]["loss"] < 0.65


def test_a_reward_model_trains_its_head_beside_the_adapter(base: Base, tmp_path: Path) -> None:
    stage = reward(base, tmp_path, adapter=LORA, epochs=0.5)
    trained(stage, tmp_path)
    folder = Path(stage.output_uri)
    newest = max((folder / "checkpoints").glob("*/*"))
    stored = FileSystemReader(str(newest)).read_metadata().state_dict_metadata
    assert "optimizer.state.exp_avg.scalar_head.weight" in stored
    card = read_card(folder)
    model = LlamaForSequenceClassification(huggingface_config(card, dtype="float32"))
    model.config.num_labels = 1
    model.score = torch.nn.Linear(64, 1, bias=False)
    scorer = PeftModel.from_pretrained(model, str(folder / "adapter"))
    head = read_weights(folder / "checkpoint")["scalar_head.weight"]
    assert torch.equal(scorer.base_model.model.score.modules_to_save["default"].weight, head)
