"""A scalar head gives the same scores under every layout, trains, and moves through checkpoints as other weights do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace_api.model import Architecture
from trainer.engine.gangs import LENGTH, PP2, TP1, TP2, gang
from trainer.engine.test_model import SHAPE, TIED, VOCAB, built
from trainer.engine.test_packed import gradient_step, packs, stepper_of


def scalar_model(ranks: Any, *, seed: int, architecture: Architecture = SHAPE) -> Any:
    from headrace_api.stages.training import Precision
    from headrace_trainer.engine.model.build import Head, build_model
    from headrace_trainer.engine.model.start import fill_start_weights

    model = build_model(
        architecture,
        gang=ranks,
        vocab_size=VOCAB,
        sequence_length=LENGTH,
        precision=Precision.FP32,
        head=Head.SCALAR,
    )
    fill_start_weights(model, architecture, seed=seed)
    return model


def scores(model: Any, batches: list[Any]) -> Any:
    from headrace_trainer.engine.forward import forward_passes

    return forward_passes(model, batches, lambda m, b: (b.run(m), lambda out: out[0, :, 0]), shape=(LENGTH,))


class Regression:
    """Scores are to be 1 at the last token of each document."""

    METRICS = ()

    def forward(self, model: Any, batch: Any) -> tuple[Any, Callable[[Any], Any]]:
        import torch

        from headrace_trainer.engine.objective import Loss

        def loss(output: Any) -> Loss:
            assert output.dtype == torch.float32
            errors = batch.lasts(output[..., 0]) - 1
            return Loss(total=errors.square().sum(), count=torch.tensor(batch.num_documents, dtype=torch.int32))

        return batch.run(model), loss


class Here:
    """A checkpoint's files that are all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def need(self, names: Any) -> None:
        assert all((self.folder / name).exists() for name in names), names


def train_and_move(rank: int, world: int, layout: dict[str, int], folder: Path, other: Path | None) -> dict[str, Any]:
    """Scores; a step; a checkpoint after it; a second step. Then the same second step from another's checkpoint."""
    from headrace_trainer.engine.checkpoint.state import StateWriter, TrainState, load_state
    from headrace_trainer.engine.packed import collate

    with built(rank, layout, SHAPE) as (ranks, _):
        batches = [collate(pack, length=LENGTH, device=ranks.device) for pack in packs()]

        def stepper_from(seed: int) -> Any:
            return stepper_of(ranks, scalar_model(ranks, seed=seed), Regression())

        def state(stepper: Any) -> TrainState:
            return TrainState(model=stepper.model.module, optimizer=stepper.optimizer)

        stepper = stepper_from(7)
        found = {"scores": scores(stepper.model, batches).tolist(), "first": gradient_step(stepper, batches)}
        stepper.update(learning_rate=1e-3, gradient_norm=found["first"]["norm"])
        stepper.gather_weights()
        folder.mkdir(exist_ok=True)
        write = StateWriter(state(stepper)).begin(folder)
        written = ranks.gather(write.write())
        if ranks.is_first:
            write.finish(written)
        ranks.barrier()
        found["second"] = gradient_step(stepper, batches)
        if other is not None:
            resumed = stepper_from(99)
            error = load_state(state(resumed), Here(other))  # type: ignore[arg-type]
            assert error is None, error
            found["resumed"] = gradient_step(resumed, batches)
            for each in (stepper, resumed):  # moments too: the weights after one more update
                each.update(learning_rate=1e-3, gradient_norm=found["second"]["norm"])
                each.gather_weights()
            found["third"] = [scores(each.model, batches).tolist() for each in (stepper, resumed)]
        return found


def load_body(rank: int, world: int, layout: dict[str, int], architecture: Architecture, folder: Path) -> list[str]:
    """Load a language model's checkpoint into a scalar model of another seed; names of the weights that are not its."""
    import torch

    from headrace_trainer.engine.checkpoint.state import save_weights
    from headrace_trainer.engine.model.scalar_head import load_language_model

    with built(rank, layout, architecture) as (ranks, language_model):
        save_weights(language_model, folder)
        model = scalar_model(ranks, seed=99, architecture=architecture)
        head = model.state_dict().get("output_layer.weight")
        head = None if head is None else head.clone()
        load_language_model(model, folder)
        body = dict(language_model.named_parameters())
        if ranks.is_last_stage:
            body["output_layer.weight"] = head
            assert head is not None and head.shape == (1, architecture.hidden_size) and head.std() > 0.05
        return [name for name, weight in model.named_parameters() if not torch.equal(weight, body[name])]


def bf16_score(rank: int, world: int) -> str:
    import torch

    from headrace_api.parallelism import Layout
    from headrace_api.stages.training import Precision
    from headrace_trainer.engine.model.build import Head, build_model
    from headrace_trainer.engine.model.start import fill_start_weights
    from headrace_trainer.engine.packed import collate
    from headrace_trainer.engine.parallel import join_gang

    with join_gang(Layout(**TP1), rank=rank) as ranks:
        model = build_model(
            SHAPE, gang=ranks, vocab_size=VOCAB, sequence_length=LENGTH, precision=Precision.BF16, head=Head.SCALAR
        )
        fill_start_weights(model, SHAPE, seed=7)
        seen = []
        model.module.output_layer.register_forward_hook(lambda _m, _given, gives: seen.append(gives[0]))
        with torch.no_grad():
            collate(packs()[0], length=LENGTH, device=ranks.device).run(model)
        # Scores that were rounded to bf16 on the way would not change when they are again.
        rounded = seen[0].to(torch.bfloat16).float()
        return f"{seen[0].dtype} {bool((rounded == seen[0]).all())}"


def test_scores_gradients_and_checkpoints_are_the_same_under_every_layout(tmp_path: Path) -> None:
    (one,) = gang(train_and_move, 1, TP1, tmp_path / "TP1", None)
    assert not one.error, one
    wanted, previous = one.value, tmp_path / "TP1"
    assert wanted["second"]["sums"][0] < wanted["first"]["sums"][0]  # it learns
    # Each resumes from what the one before it wrote: TP2 from TP1's, PP2 from TP2's, TP1 from PP2's.
    for name, layout in {"TP2": TP2, "PP2": PP2, "one": TP1}.items():
        world = layout["tensor"] * layout["pipeline"]
        ended = gang(train_and_move, world, layout, tmp_path / name, previous)
        assert not any(e.error for e in ended), ended
        previous = tmp_path / name
        for e in ended:
            for found, row in zip(e.value["scores"], wanted["scores"], strict=True):
                assert found == pytest.approx(row, abs=2e-6, rel=0)
            for step in ("first", "second"):
                assert e.value[step]["sums"] == pytest.approx(wanted[step]["sums"], rel=1e-5), step
                assert e.value[step]["norm"] == pytest.approx(wanted[step]["norm"], rel=1e-5), step
            assert e.value["resumed"]["norm"] == pytest.approx(e.value["second"]["norm"], rel=1e-5)
            own, resumed = e.value["third"]
            for found, row in zip(resumed, own, strict=True):
                assert found == pytest.approx(row, abs=1e-5, rel=0)


@pytest.mark.parametrize("architecture", [SHAPE, TIED], ids=["untied", "tied"])
def test_a_language_models_checkpoint_gives_everything_but_the_head(tmp_path: Path, architecture: Architecture) -> None:
    for name, layout in {"TP2": TP2, "PP2": PP2}.items():
        ended = gang(load_body, 2, layout, architecture, tmp_path / name)
        assert [e.value for e in ended] == [[], []], ended


def test_scores_of_a_bf16_model_are_fp32() -> None:
    (ended,) = gang(bf16_score, 1)
    assert ended.value == "torch.float32 False", ended
