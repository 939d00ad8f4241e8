"""The sections of the GPU benchmark, in the order of what is wanted first.

A section runs in the driver and hands the work to fresh processes. It returns what JSON can hold; ``Unmet`` says that
something is missing, and then it is tried again the next time.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from benchmarks.gpu import pieces
from benchmarks.training import WITHOUT_TRANSFORMER_ENGINE, Training
from headrace_api.model import PRESETS, Architecture
from headrace_api.stages.training import Fp8Recipe, Precision


class Fresh(Protocol):
    """Runs a function in a process of its own."""

    def __call__(self, piece: Callable[..., Any], *args: Any) -> Any:
        """What ``piece`` returned."""


class Unmet(Exception):
    """Something that a section needs is not on this machine."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How large everything is."""

    smoke: bool
    """Rehearse on any machine, with models of a few thousand parameters."""

    def shape(self, name: str, precision: Precision, recipe: Fp8Recipe | None) -> Training:
        """A training of the 1B model, or of as many of the 8B model's layers as fit one GPU with their state."""
        base = Training(
            architecture=PRESETS["llama-1b"],
            vocab_size=32_000,
            length=4096,
            global_batch=8,
            micro_batch=4,
            steps=1000,
            precision=precision,
            fp8_recipe=recipe,
        )
        if name == "8b":
            arch = PRESETS["llama-8b"].model_copy(update={"layers": 10})
            base = replace(base, architecture=arch, global_batch=4, micro_batch=1)
        return self._small(base) if self.smoke else base

    def text(self, precision: Precision, recipe: Fp8Recipe | None, *, steps: int) -> Training:
        """A training on source text, by the byte, with the 1B model's layers."""
        training = Training(
            architecture=PRESETS["llama-1b"],
            vocab_size=256,
            length=1024,
            global_batch=8,
            micro_batch=8,
            steps=steps,
            precision=precision,
            fp8_recipe=recipe,
            warmup=min(30, steps // 4),
        )
        return self._small(training) if self.smoke else training

    def _small(self, training: Training) -> Training:
        arch = Architecture(layers=2, hidden_size=32, heads=4, kv_heads=2, ffn_hidden_size=64)
        return replace(training, architecture=arch, vocab_size=256, length=32, global_batch=4, micro_batch=2)

    def choose(self, real: int, smoke: int) -> int:
        """A number of repetitions."""
        return smoke if self.smoke else real


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the benchmark."""

    name: str
    seconds: int
    """What it takes on an H100, roughly; it is not begun where less time is left."""
    run: Callable[[Setting, Fresh], Any]


@functools.cache
def _problem_with_te(fresh: Fresh) -> str:
    return str(fresh(pieces.transformer_engine_problem))


def _needs_te(fresh: Fresh) -> None:
    if problem := _problem_with_te(fresh):
        raise Unmet(problem)


@contextmanager
def _transformer_engine_hidden(hide: bool) -> Iterator[None]:
    """Processes that are started in this block find no Transformer Engine, if ``hide``."""
    if hide:
        os.environ[WITHOUT_TRANSFORMER_ENGINE] = "1"
    try:
        yield
    finally:
        os.environ.pop(WITHOUT_TRANSFORMER_ENGINE, None)


def _environment(setting: Setting, fresh: Fresh) -> Any:
    return fresh(pieces.environment)


def _peak(setting: Setting, fresh: Fresh) -> Any:
    return fresh(pieces.matmul_peak, setting.choose(8192, 64), setting.choose(50, 2))


def _fp8_multiplications(setting: Setting, fresh: Fresh) -> Any:
    _needs_te(fresh)
    return {recipe.value: fresh(pieces.fp8_multiplication, recipe.value, 4096, 4096, 16384, 50) for recipe in Fp8Recipe}


def _steps(
    shape: str, precision: Precision, recipe: Fp8Recipe | None = None, *, hide_te: bool = False
) -> Callable[[Setting, Fresh], Any]:
    def run(setting: Setting, fresh: Fresh) -> Any:
        if precision is Precision.FP8:
            _needs_te(fresh)
        training = setting.shape(shape, precision, recipe)
        with tempfile.TemporaryDirectory() as folder, _transformer_engine_hidden(hide_te):
            return fresh(pieces.time_steps, training, folder, setting.choose(10, 1), setting.choose(30, 2))

    return run


def _curve(precision: Precision, recipe: Fp8Recipe | None = None) -> Callable[[Setting, Fresh], Any]:
    def run(setting: Setting, fresh: Fresh) -> Any:
        if precision is Precision.FP8:
            _needs_te(fresh)
        training = setting.text(precision, recipe, steps=setting.choose(300, 6))
        with tempfile.TemporaryDirectory() as folder:
            return [float.fromhex(loss) for loss in fresh(pieces.train, training, folder)["losses"]]

    return run


def _resume(precision: Precision, recipe: Fp8Recipe | None = None) -> Callable[[Setting, Fresh], Any]:
    def run(setting: Setting, fresh: Fresh) -> Any:
        if precision is Precision.FP8:
            _needs_te(fresh)
        training = setting.text(precision, recipe, steps=setting.choose(12, 6))
        with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as cut:
            undisturbed = fresh(pieces.train, training, whole)["losses"]
            fresh(pieces.train, training, cut, 1, training.steps // 2)
            resumed = fresh(pieces.train, training, cut, 2)
        return {
            "steps": training.steps,
            "resumed_after": resumed["first_step"],
            "identical": resumed["first_step"] > 0 and resumed["losses"] == undisturbed,
        }

    return run


def _saves(setting: Setting, fresh: Fresh) -> Any:
    every = setting.choose(10, 4)
    training = replace(setting.shape("1b", Precision.BF16, None), steps=3 * every + 2, save_every=every)
    with tempfile.TemporaryDirectory() as folder:
        return fresh(pieces.time_saves, training, folder)


def _beside_megatron(precision: Precision, recipe: Fp8Recipe | None = None) -> Callable[[Setting, Fresh], Any]:
    def run(setting: Setting, fresh: Fresh) -> Any:
        if precision is Precision.FP8:
            _needs_te(fresh)
        # Two models and their state lie in memory at once.
        training = replace(setting.shape("1b", precision, recipe), micro_batch=2)
        with tempfile.TemporaryDirectory() as folder:
            return fresh(pieces.beside_megatron, training, folder, setting.choose(12, 2), setting.choose(4, 1))

    return run


def _beside_transformers(setting: Setting, fresh: Fresh) -> Any:
    training = setting.shape("1b", Precision.BF16, None)
    return fresh(pieces.transformers_steps, training, not setting.smoke, setting.choose(10, 1), setting.choose(30, 2))


def _serve(setting: Setting, fresh: Fresh) -> Any:
    if not setting.smoke and not pieces.has_vllm():
        raise Unmet("vLLM is not installed")
    training = setting.text(Precision.BF16, None, steps=setting.choose(100, 6))
    with tempfile.TemporaryDirectory() as folder:
        exported = fresh(pieces.train_and_export, training, folder)
        expected = fresh(pieces.greedy_by_transformers, exported, 16)
        if not pieces.has_vllm():
            return {"engine": "transformers", "same_tokens": sum(map(len, expected)), "of": 16 * len(expected)}
        served = fresh(pieces.greedy_by_vllm, exported, 16)
    same = sum(
        a == b
        for ours, theirs in zip(served["tokens"], expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    return {
        "engine": "vllm",
        "same_tokens": same,
        "of": 16 * len(expected),
        "tokens_per_second": served["tokens_per_second"],
    }


def sections() -> list[Section]:
    """All of them."""
    bf16, fp8 = Precision.BF16, Precision.FP8
    tensorwise, delayed, blockwise = Fp8Recipe.TENSORWISE, Fp8Recipe.DELAYED, Fp8Recipe.BLOCKWISE
    return [
        Section(name="environment", seconds=20, run=_environment),
        Section(name="peak", seconds=25, run=_peak),
        Section(name="step-1b-bf16-without-te", seconds=70, run=_steps("1b", bf16, hide_te=True)),
        Section(name="fp8-multiplication", seconds=35, run=_fp8_multiplications),
        Section(name="step-1b-bf16", seconds=70, run=_steps("1b", bf16)),
        Section(name="step-1b-fp8-tensorwise", seconds=70, run=_steps("1b", fp8, tensorwise)),
        Section(name="step-8b-bf16", seconds=75, run=_steps("8b", bf16)),
        Section(name="step-8b-fp8-tensorwise", seconds=75, run=_steps("8b", fp8, tensorwise)),
        Section(name="resume-bf16", seconds=90, run=_resume(bf16)),
        Section(name="resume-fp8-tensorwise", seconds=90, run=_resume(fp8, tensorwise)),
        Section(name="beside-megatron-bf16", seconds=120, run=_beside_megatron(bf16)),
        Section(name="save", seconds=90, run=_saves),
        Section(name="curve-bf16", seconds=100, run=_curve(bf16)),
        Section(name="curve-fp8-tensorwise", seconds=100, run=_curve(fp8, tensorwise)),
        Section(name="step-8b-fp8-delayed", seconds=75, run=_steps("8b", fp8, delayed)),
        Section(name="step-8b-fp8-blockwise", seconds=75, run=_steps("8b", fp8, blockwise)),
        Section(name="step-1b-fp8-delayed", seconds=70, run=_steps("1b", fp8, delayed)),
        Section(name="step-1b-fp8-blockwise", seconds=70, run=_steps("1b", fp8, blockwise)),
        Section(name="beside-transformers", seconds=150, run=_beside_transformers),
        Section(name="curve-fp8-delayed", seconds=100, run=_curve(fp8, delayed)),
        Section(name="curve-fp8-blockwise", seconds=100, run=_curve(fp8, blockwise)),
        Section(name="resume-fp8-delayed", seconds=90, run=_resume(fp8, delayed)),
        Section(name="beside-megatron-fp8", seconds=120, run=_beside_megatron(fp8, tensorwise)),
        Section(name="serve", seconds=240, run=_serve),
    ]
