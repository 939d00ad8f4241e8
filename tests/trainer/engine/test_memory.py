"""The planner's memory of a rank against what a real gang allocates, tensor by tensor."""

import gc
from typing import Any

import pytest

from headrace_api.model import Architecture
from headrace_api.parallelism import Layout
from headrace_api.planning.memory import Batches, Memory, fullest_rank, num_stage_parameters
from headrace_api.stages import Lora, LoraTarget
from headrace_api.stages.training import Precision
from trainer.engine.gangs import DP2, PP2, TP1, TP2, TP2_PP2, gang

SHAPE = Architecture(layers=4, hidden_size=256, heads=8, kv_heads=4, ffn_hidden_size=704)
TIED = SHAPE.model_copy(update={"tie_embeddings": True})
VOCAB, LENGTH, MICRO_BATCH, MICRO_BATCHES = 1500, 128, 2, 3


def allocated() -> int:
    """Bytes of every tensor that is alive in this process, each storage counted once."""
    import torch

    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(
    rank: int, world: int, layout: dict[str, int], arch: Architecture, precision: Precision, lora: Lora | None
) -> dict[str, Any]:
    """One step of training: what stays, and what the first micro-batch saves for its backward pass."""
    import numpy as np
    import torch

    from headrace_api.stages.training import Optimizer, Schedule
    from headrace_trainer.engine.batches import GlobalBatch
    from headrace_trainer.engine.model.build import build_model
    from headrace_trainer.engine.model.lora import add_adapters
    from headrace_trainer.engine.objective import NextToken
    from headrace_trainer.engine.optimizer import build_optimizer, wrap_model
    from headrace_trainer.engine.parallel import join_gang
    from headrace_trainer.engine.step import Stepper

    with join_gang(Layout(**layout), rank=rank, seed=1) as ranks:
        before = allocated()
        model = build_model(arch, gang=ranks, vocab_size=VOCAB, sequence_length=LENGTH, precision=precision)
        if lora is not None:
            add_adapters(model, lora)
        wrapped, objective = wrap_model(model), NextToken()
        optimizer = build_optimizer(wrapped, Optimizer(), schedule=Schedule(), precision=precision)
        stepper = Stepper(
            gang=ranks, model=wrapped, optimizer=optimizer, objective=objective, sequence_length=LENGTH,
            micro_batch_size=MICRO_BATCH, weight_decay=0.1,
        )  # fmt: skip
        samples = [np.random.default_rng(0).integers(0, VOCAB, LENGTH + 1)] * MICRO_BATCH
        weights = {p.untyped_storage().data_ptr() for p in wrapped.parameters()}

        def batch(size: int) -> GlobalBatch:
            micro_batch = objective.collate(samples, [1.0] * MICRO_BATCH, ranks.device)
            return GlobalBatch(num_micro_batches=size, micro_batches=iter([micro_batch] * size))

        saved: dict[int, int] = {}
        held: list[torch.Tensor] = []  # a storage that is freed gives its address to the next one

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
                held.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stepper.gradients(batch(1))
        held.clear()
        stepper.gradients(batch(MICRO_BATCHES))
        stepper.update(learning_rate=1e-3, gradient_norm=stepper.gradient_norm())
        return {
            "stage": ranks.pipeline_rank,
            "state": allocated() - before,
            "parameters": sum(p.numel() for p in model.parameters()),
            "saved": sum(saved.values()),
            "sequence_parallel": bool(wrapped.config.sequence_parallel),
        }


def planned(
    layout: dict[str, int], arch: Architecture, precision: Precision, lora: Lora | None, *, sequence_parallel: bool
) -> Memory:
    batches = Batches(sequence_length=LENGTH, micro_batch_size=MICRO_BATCH, num_micro_batches=1)
    return fullest_rank(
        arch, Layout(**layout), vocab_size=VOCAB, precision=precision, batches=batches, fused=False,
        sequence_parallel=sequence_parallel, lora=lora,
    )  # fmt: skip


CASES = [
    (TP1, SHAPE, Precision.FP32, None),
    (TP1, TIED, Precision.BF16, None),
    (TP2, SHAPE, Precision.BF16, None),
    (DP2, SHAPE, Precision.BF16, None),
    (PP2, SHAPE, Precision.FP32, None),
    (PP2, TIED, Precision.BF16, None),
    pytest.param(TP2_PP2, SHAPE, Precision.BF16, None, marks=pytest.mark.slow),
    (TP1, SHAPE, Precision.FP32, Lora(rank=16)),
    (TP1, TIED, Precision.BF16, Lora(rank=16, targets=[LoraTarget.QKV, LoraTarget.PROJ])),
    (TP2, SHAPE, Precision.BF16, Lora(rank=64)),
    (PP2, TIED, Precision.BF16, Lora(rank=16)),
]


@pytest.mark.parametrize(("layout", "arch", "precision", "lora"), CASES)
def test_the_plan_is_what_the_fullest_rank_allocates(
    layout: dict[str, int], arch: Architecture, precision: Precision, lora: Lora | None
) -> None:
    world = layout["tensor"] * layout["pipeline"] * layout["data"]
    ended = gang(measure, world, layout, arch, precision, lora)
    assert not any(e.error for e in ended), ended
    found = [e.value for e in ended]
    for rank in found:
        added = lora.num_parameters(arch, tensor=layout["tensor"]) // layout["pipeline"] if lora is not None else 0
        own = num_stage_parameters(arch, Layout(**layout), stage=rank["stage"], vocab_size=VOCAB)
        assert rank["parameters"] == own + added
    plan = planned(layout, arch, precision, lora, sequence_parallel=found[0]["sequence_parallel"])
    fullest = max(found, key=lambda rank: rank["state"] + rank["saved"])
    # A stage holds on to the last tensors that it was sent and sent back.
    passed = 2 * LENGTH * MICRO_BATCH * arch.hidden_size * 4 if layout["pipeline"] > 1 else 0
    assert plan.state * 0.99 < fullest["state"] < plan.state * 1.01 + passed
    assert fullest["saved"] == pytest.approx(plan.activations, rel=0.05)
