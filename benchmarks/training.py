"""Trainings that benchmarks time: one through ``engine.loop``, as a pretrain stage does it, and one by bare Megatron-core.

Both are built from a ``Training``, read the same samples, and must end with the same losses.
"""
# ruff: noqa: E402

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

WITHOUT_TRANSFORMER_ENGINE = "HEADRACE_BENCHMARK_WITHOUT_TRANSFORMER_ENGINE"
if os.environ.get(WITHOUT_TRANSFORMER_ENGINE):
    # Megatron looks for it while it is imported.
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]

from headrace_api.contract import ResolvedStage
from headrace_api.model import Architecture
from headrace_api.parallelism import Layout
from headrace_api.stages.pretrain import Pretrain
from headrace_api.stages.training import Fp8Recipe, Precision
from headrace_trainer.engine.batches import Samples
from headrace_trainer.engine.loop import Loop
from headrace_trainer.engine.parallel import Gang, join_gang
from headrace_trainer.formats.model_card import ModelCard, describe
from headrace_trainer.stage import StageContext
from headrace_trainer.storage import ObjectStore

ONE_RANK = Layout(tensor=1, pipeline=1, data=1)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, and how."""

    architecture: Architecture
    vocab_size: int
    length: int
    """Tokens in a sample."""
    global_batch: int
    """Samples in a step."""
    micro_batch: int
    steps: int
    precision: Precision = Precision.BF16
    fp8_recipe: Fp8Recipe | None = None
    layout: Layout = ONE_RANK
    learning_rate: float = 3e-4
    warmup: int = 3
    save_every: int = 10**6
    """Steps between checkpoints."""
    seed: int = 1

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch."""
        return self.global_batch * self.length

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of a forward and a backward pass: 6 for each weight that multiplies (arXiv
        2001.08361, section 2.1), and 6 x layers x width x length for causal attention, whose upper half is not computed."""
        arch = self.architecture
        looked_up = 0 if arch.tie_embeddings else self.vocab_size * arch.hidden_size
        multiplied = arch.num_parameters(self.vocab_size) - looked_up
        return 6.0 * multiplied + 6.0 * arch.layers * arch.hidden_size * self.length

    @property
    def card(self) -> ModelCard:
        """The model's card."""
        return describe(
            self.architecture,
            vocab_size=self.vocab_size,
            eod_id=0,
            sequence_length=self.length,
            precision=self.precision,
        )

    def stage(self, folder: Path, *, attempt: int = 1) -> ResolvedStage:
        """The pretrain stage; its storage is in ``folder``."""
        pretrain = Pretrain.model_validate(
            {
                "from": {"shards": "shards"},
                "model": self.architecture.dump(),
                "tokens": self.steps * self.tokens_per_step,
                "sequence_length": self.length,
                "global_batch_size": self.global_batch,
                "micro_batch_size": self.micro_batch,
                "precision": self.precision,
                "fp8_recipe": self.fp8_recipe,
                "parallelism": {"tensor": self.layout.tensor, "pipeline": self.layout.pipeline},
                "schedule": {"learning_rate": self.learning_rate, "warmup": self.warmup},
                "checkpoint": {"every": self.save_every},
                "validation": {"every": 10**6, "samples": 1},
            }
        )
        compute = {"ranksPerNode": self.layout.world}
        if self.precision is Precision.FP8:
            compute["gpusPerNode"] = self.layout.world
        return ResolvedStage.model_validate(
            {
                "run": "benchmark",
                "stage": {"name": "pretrain", "compute": compute, "pretrain": pretrain.dump()},
                "attempt": attempt,
                "seed": self.seed,
                "hash": "a" * 64,
                "inputs": {"shards": {"uri": str(folder), "digest": "d" * 64, "kind": "shards"}},
                "storage": {"uri": str(folder / "storage")},
                "outputUri": str(folder / "storage" / "pretrain"),
            }
        )


class RandomSamples:
    """Tokens without meaning, the same for everybody."""

    num_samples = 64

    def __init__(self, training: Training) -> None:
        size = (self.num_samples, training.length + 1)
        self._tokens = np.random.default_rng(0).integers(0, training.vocab_size, size)

    def sample(self, index: int) -> np.ndarray:
        """Sample ``index``, again from the start where there are no more."""
        found: np.ndarray = self._tokens[index % self.num_samples]
        return found


class SourceText:
    """The bytes of Python's own library, a token each: real text that is on every machine."""

    def __init__(self, training: Training) -> None:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        text = np.frombuffer(b"".join(path.read_bytes() for path in files), dtype=np.uint8)
        self._windows = len(text) // (training.length + 1)
        self._text = text[: self._windows * (training.length + 1)].reshape(self._windows, -1).astype(np.int64)
        self._order = np.random.default_rng(0).permutation(self._windows)
        self.num_samples = self._windows

    def sample(self, index: int) -> np.ndarray:
        """A window, in shuffled order."""
        found: np.ndarray = self._text[self._order[index % self._windows]]
        return found


@contextmanager
def opened(
    training: Training,
    folder: Path,
    *,
    samples: Samples | None = None,
    rank: int = 0,
    attempt: int = 1,
    own_node: bool = False,
    store: ObjectStore | None = None,
) -> Iterator[Loop]:
    """A loop before its first step, or after the step of the newest checkpoint in ``folder``.

    Args:
        training: what is trained.
        folder: for storage and scratch.
        samples: what is read; random tokens if None.
        rank: this rank's number; ``MASTER_ADDR`` and ``MASTER_PORT`` must be set where there are several.
        attempt: the stage's.
        own_node: whether each rank has a node, and so a scratch folder, of its own.
        store: the run's, if not the directory ``storage`` in ``folder``.
    """
    from headrace_trainer.stages.pretrain.stage import build_loop

    layout, stage = training.layout, training.stage(folder, attempt=attempt)
    local_rank, local_world = (0, 1) if own_node else (rank, layout.world)
    scratch = folder / f"scratch-{attempt}" / (f"node-{rank}" if own_node else "")
    ctx = StageContext(resolved=stage, scratch=scratch, rank=rank, world=layout.world, local_rank=local_rank)
    ctx.store = store or ctx.store
    samples = samples or RandomSamples(training)
    with join_gang(layout, rank=rank, local_rank=local_rank, local_world=local_world, seed=training.seed) as gang:
        loop = build_loop(ctx, gang, training.card, training=samples, validation=samples)
        loop.resume()
        yield loop


class Bare:
    """The least that trains: Megatron-core's schedule, optimizer and rate, and the loss on the host once a step."""

    def __init__(self, training: Training, gang: Gang, samples: Samples) -> None:
        from headrace_trainer.engine.device import megatron as m
        from headrace_trainer.engine.model.build import build_model
        from headrace_trainer.engine.model.start import fill_start_weights

        self.training, self.gang, self.samples, self.step = training, gang, samples, 0
        self.losses: list[float] = []
        """Of each step, over this replica's tokens."""
        model = build_model(
            training.architecture,
            gang=gang,
            vocab_size=training.vocab_size,
            sequence_length=training.length,
            precision=training.precision,
            fp8_recipe=training.fp8_recipe,
        )
        fill_start_weights(model, training.architecture, seed=training.seed)
        overlap = gang.layout.data > 1
        settings = m.DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
        )
        self.model = m.DistributedDataParallel(model.config, settings, model)
        model.config.finalize_model_grads_func = m.finalize_model_grads
        model.config.no_sync_func = self.model.no_sync if overlap else None
        self.optimizer, self.scheduler = self._optimizer(m)
        model.config.grad_scale_func = self.optimizer.scale_loss
        self.forward_backward = m.get_forward_backward_func()

    def _optimizer(self, m: Any) -> tuple[Any, Any]:
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        settings: Any = self.training.stage(Path()).stage.config
        rates = {"lr": settings.schedule.learning_rate, "min_lr": settings.schedule.final_rate}
        optimizer = m.get_megatron_optimizer(
            m.OptimizerConfig(
                optimizer="adam",
                **rates,
                weight_decay=settings.optimizer.weight_decay,
                adam_beta1=settings.optimizer.beta1,
                adam_beta2=settings.optimizer.beta2,
                adam_eps=settings.optimizer.epsilon,
                clip_grad=settings.optimizer.clip_norm,
                bf16=self.training.precision is not Precision.FP32,
                params_dtype=next(self.model.parameters()).dtype,
                use_distributed_optimizer=True,
            ),
            [self.model],
            use_gloo_process_groups=False,
        )
        scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=settings.schedule.learning_rate,
            min_lr=settings.schedule.final_rate,
            lr_warmup_steps=settings.schedule.warmup,
            lr_decay_steps=settings.steps,
            lr_decay_style="cosine",
            start_wd=settings.optimizer.weight_decay,
            end_wd=settings.optimizer.weight_decay,
            wd_incr_steps=settings.steps,
            wd_incr_style="constant",
        )
        scheduler.step(increment=1)
        return optimizer, scheduler

    def advance(self) -> None:
        """One step."""
        t = self.training
        num_micro_batches = t.global_batch // (t.micro_batch * self.gang.layout.data)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        found = self.forward_backward(
            forward_step_func=self._forward,
            data_iterator=self._micro_batches(num_micro_batches),
            model=[self.model],
            num_microbatches=num_micro_batches,
            seq_length=t.length,
            micro_batch_size=t.micro_batch,
            forward_only=False,
        )
        self.optimizer.step()
        self.scheduler.step(increment=1)
        self.losses.append(torch.stack(found).sum().item() / (num_micro_batches * t.micro_batch * t.length))
        self.step += 1

    def _micro_batches(self, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        size, replicas = self.training.micro_batch, self.gang.layout.data
        for i in range(count):
            first = self.step * self.training.global_batch + (i * replicas + self.gang.data_rank) * size
            samples = torch.from_numpy(np.stack([self.samples.sample(first + j) for j in range(size)]))
            samples = samples.to(self.gang.device)
            yield samples[:, :-1].contiguous(), samples[:, 1:].contiguous()

    def _forward(self, micro_batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        tokens, labels = next(micro_batches)
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        output = model(tokens, positions, None, labels=labels)

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            total = output.float().sum()
            num_tokens = torch.full((), output.numel(), dtype=torch.int32, device=output.device)
            return total, num_tokens, total.detach().clone()

        return output, loss
