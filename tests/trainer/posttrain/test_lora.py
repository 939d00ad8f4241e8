"""Adapters: what a stage trains of a model, under every layout, and what PEFT makes of what it leaves."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headrace_api.contract import ResolvedStage
from headrace_api.model import Architecture
from headrace_api.stages import Lora
from trainer.engine.gangs import DP2, PP2, TP1, TP2, gang
from trainer.posttrain.chain import Base, history, pretrained, stage_rank
from trainer.posttrain.test_dpo import dpo
from trainer.posttrain.test_sft import fine_tuned, sft

LORA = {"lora": {"rank": 4, "alpha": 8}}
PROMPTS = [[1, 2, 3], [7, 300, 12, 9, 250], [399, 400, 401]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"))


def adapted(base: Base, folder: Path, layout: dict[str, int] = TP1, **fields: Any) -> ResolvedStage:
    schedule = {"learningRate": 3e-2, "warmup": 2}
    return sft(base, folder, layout, **{"adapter": LORA, "schedule": schedule} | fields)


def watched_rank(rank: int, world: int, stage: ResolvedStage, folder: Path) -> dict[str, Any]:
    """One rank of an sft stage to its end; what it trained, and which weights of its base model have changed."""
    from headrace_trainer.stages.sft import stage as sft_stage

    leave, seen = sft_stage.leave_finetuned, {}

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

    sft_stage.leave_finetuned = look_and_leave
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
    whole = fine_tuned(sft(base, tmp_path, epochs=0.2), tmp_path)
    losses = records(one_rank[0])
    assert losses[0]["loss_hex"] == whole[0]["loss_hex"]
    assert losses[0]["loss"] > 5
    assert sum(r["loss"] for r in losses[-4:]) / 4 < 2.5


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
    (newest,) = sorted((one_rank[0] / "storage/sft/checkpoints").glob("*/*"))[-1:]
    weights = sum(p.stat().st_size for p in newest.glob("*.distcp"))
    assert weights < 12 * one_rank[1]["trained"] + 20_000 < 4 * 64 * 1024  # less than its base's embedding


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
        found.append(fine_tuned(adapted(base, folder, layout, sequenceLength=63, microBatchSize=1), folder))
    assert [r["loss"] for r in found[1]] == pytest.approx([r["loss"] for r in found[0]], abs=1e-5, rel=0)


def test_a_killed_stage_goes_on_bit_for_bit(base: Base, tmp_path: Path) -> None:
    whole = fine_tuned(adapted(base, tmp_path / "whole", DP2), tmp_path / "whole")
    seed = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(10**6)))
    print(f"HEADRACE_TEST_SEED={seed}")
    killed = gang(
        stage_rank, 2, adapted(base, tmp_path, DP2), tmp_path, random.Random(seed).randrange(5, len(whole) - 1)
    )
    assert killed[-1].exit_code == -signal.SIGKILL
    resumed = fine_tuned(adapted(base, tmp_path, DP2, attempt=2), tmp_path)
    assert [r["loss_hex"] for r in resumed] == [r["loss_hex"] for r in whole]
