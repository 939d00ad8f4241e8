"""What the sections measure: each piece runs in a process of its own, so that none finds another's memory or state.

Pieces take plain values and return what JSON can hold.
"""

import importlib.metadata
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loop import Case, compare
from benchmarks.training import RandomSamples, SourceText, Training, opened
from headrace_api.planning import estimate_training
from headrace_api.stages.training import Fp8Recipe
from headrace_trainer.engine import device
from headrace_trainer.engine.batches import Samples
from headrace_trainer.engine.loop import Loop
from headrace_trainer.errors import Stopped

_PACKAGES = ("torch", "triton", "transformer-engine", "megatron-core", "transformers", "vllm")


def environment() -> dict[str, Any]:
    """What this machine is and has."""
    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()),
        }
    return found


def transformer_engine_problem() -> str:
    """Why Transformer Engine cannot be used; empty if it can."""
    if not device.has_transformer_engine():
        return "Transformer Engine is not installed" if device.has_cuda() else "no GPU"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:
        return f"Transformer Engine is not imported: {error}"
    return ""


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], *, warm_up: int, repeats: int) -> float:
    """Seconds of one repetition; the GPU is waited for at the two ends only."""
    for _ in range(warm_up):
        work()
    synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    return (time.perf_counter() - begun) / repeats


def matmul_peak(size: int, repeats: int) -> dict[str, float]:
    """The best rate of a square bf16 multiplication of random numbers, which is what a model can reach at most."""
    on = device.compute_device()
    a, b = (torch.randn(size, size, device=on).bfloat16() for _ in range(2))
    best = min(seconds_of(lambda: a @ b, warm_up=2, repeats=repeats) for _ in range(3))
    return {"size": size, "tflops": 2 * size**3 / best / 1e12}


def fp8_multiplications(m: int, n: int, k: int, repeats: int) -> dict[str, dict[str, float]]:
    """A layer's forward pass in fp8 by each recipe, beside bf16: rates, casts included, and how far results are apart."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    kinds = {
        Fp8Recipe.DELAYED: recipes.DelayedScaling,
        Fp8Recipe.TENSORWISE: recipes.Float8CurrentScaling,
        Fp8Recipe.BLOCKWISE: recipes.Float8BlockScaling,
    }
    x, flops, found = torch.randn(m, k, device="cuda").bfloat16(), 2 * m * n * k, {}
    for name, kind in kinds.items():
        layer = te.Linear(k, n, bias=False, params_dtype=torch.bfloat16, device="cuda")
        with torch.no_grad():
            expected = layer(x).float()
            seconds_bf16 = seconds_of(lambda layer=layer: layer(x), warm_up=3, repeats=repeats)
            with te.autocast(enabled=True, recipe=kind()):
                # Delayed scales come from the calls before.
                seconds = seconds_of(lambda layer=layer: layer(x), warm_up=5, repeats=repeats)
                apart = layer(x).float() - expected
        found[name.value] = {
            "relative_error": (apart.norm() / expected.norm()).item(),
            "tflops": flops / seconds / 1e12,
            "tflops_bf16": flops / seconds_bf16 / 1e12,
        }
    return found


def time_steps(training: Training, folder: str, warm_up: int, repeats: int) -> dict[str, Any]:
    """Steps of the loop: tokens a second, and memory beside what the planner says of the state."""
    with opened(training, Path(folder)) as loop:
        seconds = seconds_of(loop.advance, warm_up=warm_up, repeats=repeats)
        config = loop.config
        loss = loop.history.records[-1]["loss"]
    planned = estimate_training(
        config,
        config.model.architecture,
        num_ranks=training.layout.world,
        vocab_size=training.vocab_size,
        on_gpus=device.has_cuda(),
    )
    return {
        "kernels": "Transformer Engine" if device.has_transformer_engine() else "local",
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": training.tokens_per_step / seconds,
        "tflops": training.flops_per_token * training.tokens_per_step / seconds / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "planned_state_gib": planned.state_bytes_per_rank / 2**30,
        "parameters": planned.parameters,
        "loss": loss,
    }


def train(training: Training, folder: str, attempt: int = 1, stop_at: int | None = None) -> dict[str, Any]:
    """A whole training on source text, or the part of one from its newest checkpoint, or up to where it is stopped."""
    samples: Samples = SourceText(training)
    if stop_at is not None:
        samples = StoppingSamples(samples, Path(folder) / f"scratch-{attempt}", stop_at * training.global_batch)
    loop: Loop | None = None
    try:
        with opened(training, Path(folder), samples=samples, attempt=attempt) as loop:
            first = loop.step
            loop.run()
    except Stopped:
        pass
    assert loop is not None
    return {"first_step": first, "losses": [record["loss_hex"] for record in loop.history.records]}


class StoppingSamples:
    """Samples whose reader is asked to stop when it reaches one of them."""

    def __init__(self, samples: Samples, scratch: Path, index: int) -> None:
        self._samples, self._scratch, self._index = samples, scratch, index
        self.num_samples = samples.num_samples

    def sample(self, index: int) -> np.ndarray:
        """As ``samples``."""
        if index >= self._index:
            (self._scratch / "stop").touch()
        return self._samples.sample(index)


def time_saves(training: Training, folder: str) -> dict[str, Any]:
    """Every step's time, and which of them saved; the bytes of a checkpoint."""
    milliseconds, saved = [], []
    with opened(training, Path(folder)) as loop:
        for _ in range(training.steps):
            synchronize()
            begun = time.perf_counter()
            loop.advance()
            synchronize()
            milliseconds.append(1e3 * (time.perf_counter() - begun))
            saved.append(loop.step % training.save_every == 0)
    checkpoints = [p for p in (Path(folder) / "storage").rglob("step-*") if p.is_dir()]
    size = sum(f.stat().st_size for f in checkpoints[0].iterdir()) if checkpoints else 0
    # The first steps are slow for other reasons.
    steady = list(zip(milliseconds, saved, strict=True))[training.save_every // 2 :]
    plain = statistics.median(ms for ms, is_save in steady if not is_save)
    return {
        "bytes": size,
        "plain_milliseconds": plain,
        "stall_milliseconds": statistics.median(ms for ms, is_save in steady if is_save) - plain,
        "all_milliseconds": milliseconds,
    }


def beside_megatron(training: Training, folder: str, rounds: int, steps: int) -> dict[str, Any]:
    """The loop and a bare Megatron-core one in turns."""
    case = Case(model="", layout="1 rank", training=training, rounds=rounds, steps=steps)
    outcome = compare(case, 0, Path(folder))
    assert outcome is not None
    return {
        "milliseconds": outcome.wall.ours,
        "bare_milliseconds": outcome.wall.bare,
        "ratio": outcome.wall.ratio,
        "ratio_quartiles": list(outcome.wall.ratio_quartiles),
        "tokens_per_second": training.tokens_per_step / outcome.wall.ours * 1e3,
        "wait_microseconds": outcome.wait_microseconds,
    }


def transformers_steps(training: Training, compile: bool, warm_up: int, repeats: int) -> dict[str, Any]:
    """The same shape by transformers' Llama: fp32 weights, bf16 autocast, torch's fused AdamW, compiled."""
    from transformers import LlamaForCausalLM

    from headrace_trainer.formats.huggingface.configs import huggingface_config

    on = device.compute_device()
    model: Any = LlamaForCausalLM(huggingface_config(training.card, dtype="float32")).to(on)
    forward = torch.compile(model) if compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    samples = RandomSamples(training)
    per_step = training.global_batch // training.micro_batch

    def step() -> None:
        for i in range(per_step):
            batch = np.stack([samples.sample(i * training.micro_batch + j) for j in range(training.micro_batch)])
            tokens = torch.from_numpy(batch).to(on)
            with torch.autocast(on.type, dtype=torch.bfloat16):
                logits = forward(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            (loss / per_step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = seconds_of(step, warm_up=warm_up, repeats=repeats)
    return {"compiled": compile, "milliseconds": 1e3 * seconds, "tokens_per_second": training.tokens_per_step / seconds}


def train_and_export(training: Training, folder: str) -> str:
    """A short training's model as transformers and vLLM load it; the folder."""
    from headrace_api.stages.export import ExportDtype
    from headrace_trainer.formats.huggingface.names import to_huggingface
    from headrace_trainer.formats.model_card import CHECKPOINT_FOLDER
    from headrace_trainer.stages.export.stage import write_model
    from headrace_trainer.stages.export.weights import read_weights
    from headrace_trainer.stages.pretrain.stage import leave_model

    output, exported = Path(folder) / "output", Path(folder) / "exported"
    with opened(training, Path(folder), samples=SourceText(training)) as loop:
        loop.run()
        output.mkdir()
        leave_model(output, loop, training.card)
    exported.mkdir()
    weights = to_huggingface(read_weights(output / CHECKPOINT_FOLDER), training.card)
    tensors = {name: tensor.bfloat16() for name, tensor in weights.items()}
    write_model(exported, tensors, training.card, dtype=ExportDtype.BF16)
    return str(exported)


PROMPTS = ["def __init__(self, name):\n    ", "import os\nimport ", "    return self."]


def greedy_by_transformers(folder: str, num_tokens: int) -> list[list[int]]:
    """The likeliest continuations of the prompts, a byte a token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).to(device.compute_device())
    found = []
    for prompt in PROMPTS:
        tokens = torch.tensor([list(prompt.encode())], device=model.device)
        continued = model.generate(
            tokens, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, eos_token_id=None
        )
        found.append(continued[0, tokens.size(1) :].tolist())
    return found


def greedy_by_vllm(folder: str, num_tokens: int) -> dict[str, Any]:
    """The same by vLLM, and how fast it is with many requests at once."""
    from vllm import LLM, SamplingParams

    engine = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.5)
    prompts = [{"prompt_token_ids": list(prompt.encode())} for prompt in PROMPTS]
    greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    found = [list(output.outputs[0].token_ids) for output in engine.generate(prompts, greedy)]
    begun = time.perf_counter()
    engine.generate(prompts * 64, greedy)
    seconds = time.perf_counter() - begun
    return {"tokens": found, "tokens_per_second": 64 * len(PROMPTS) * num_tokens / seconds}


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None
