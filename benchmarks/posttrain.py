"""Stages after pretraining beside TRL: samples a second and memory, ``python -m benchmarks.posttrain``.

Both train the same Llama folder of random weights on the same records on the same processors, in turns, each in a program
of its own: full fine-tuning in fp32 with AdamW, the same batch, the same longest sample. What is timed begins after the
first steps and ends with the last one, so neither start-up nor saving counts. A sample is a record, a pair, or an answer.
Memory is the most that a program and its children hold together (PSS) beyond what it held once everything was imported.

Records have lengths as conversations have: a few are long, most are short. TRL pads each batch to its longest record. Headrace
lays documents end to end, so it does not compute padding in either mode; packing fills its samples besides.

``generation`` compares tokens a second with transformers' ``generate`` and its cache: greedy, 16 prompts at once.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from headrace_api.parallelism import Layout

ONE_RANK = Layout(tensor=1, pipeline=1, data=1)
RESULTS = Path(__file__).parent / "results"
LIMIT = 1.5
"""Times TRL's samples a second that each stage must reach, at no more memory."""
GENERATION_LIMIT = 1.0
"""Times transformers' tokens a second."""
LENGTH, BATCH, MICRO, STEPS, WARM_UP = 512, 16, 4, 8, 2
GROUP, NEW_TOKENS = 8, 48
WORDS = (
    "river",
    "stone",
    "light",
    "harbour",
    "winter",
    "letter",
    "garden",
    "engine",
    "silver",
    "market",
    "window",
    "storm",
)
GENERATION = "generation"
CASES = ("sft", "sft packed", "dpo", "grpo", GENERATION)
PROMPT_TOKENS, LONG = 32, 192
"""Of generation: tokens of the longest prompt, and new ones."""
ANSWER = r"[aeiou]"
"""What an answer is rewarded for: both sides search for it."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One program's training."""

    samples_per_second: float
    extra_bytes: int
    """Most memory beyond that before training."""
    tokens: list[list[int]] | None = None
    """What was generated, where that is compared."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A case's medians."""

    case: str
    ours: Run
    trl: Run
    all_ours: tuple[float, ...]
    all_trl: tuple[float, ...]

    @property
    def is_enough(self) -> bool:
        """Whether it is as fast as it must be, at no more memory."""
        if self.case == GENERATION:
            return self.speed >= GENERATION_LIMIT
        return self.speed >= LIMIT and self.memory <= 1

    @property
    def speed(self) -> float:
        """Times TRL's samples a second."""
        return self.ours.samples_per_second / self.trl.samples_per_second

    @property
    def memory(self) -> float:
        """Times TRL's memory."""
        return self.ours.extra_bytes / self.trl.extra_bytes


# Both sides read this ---------------------------------------------------------------------------------------------


def write_model(folder: Path) -> None:
    """A Llama of 13 million random weights with a tokenizer and a template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bytewise.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>", pad_token="<s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] + eos_token }}"
        "{% endgeneration %}{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": LENGTH}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), num_key_value_heads=6, **shape, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def records(case: str) -> Iterator[dict[str, Any]]:
    """As many as the steps take; lengths are log-normal."""
    draw = random.Random(1)

    def text(scale: float) -> str:
        return " ".join(draw.choices(WORDS, k=max(1, min(80, round(draw.lognormvariate(3, 0.8) * scale)))))

    for _ in range(STEPS * BATCH):
        asked = [{"role": "user", "content": text(0.4)}]
        if case == "grpo":
            yield {"prompt": asked}
        elif case == "dpo":
            sides = ([{"role": "assistant", "content": text(0.8)}] for _ in range(2))
            yield {"prompt": asked, **dict(zip(("chosen", "rejected"), sides, strict=True))}
        else:
            yield {"messages": [*asked, {"role": "assistant", "content": text(1)}]}


class Clock:
    """Notes when each step ends; says when memory is looked at first."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> None:
        """A step ended."""
        self.ends.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        """Mean after the warm-up."""
        return (self.ends[-1] - self.ends[WARM_UP - 1]) / (len(self.ends) - WARM_UP)


# Ours -------------------------------------------------------------------------------------------------------------


def generate_ours(_: str, folder: Path) -> None:
    """Tokens by ``engine.generation``."""
    import torch

    from headrace_api.run import Storage
    from headrace_api.stages.training import Precision
    from headrace_trainer.engine.generation import Prompt, generate
    from headrace_trainer.engine.model.build import build_model
    from headrace_trainer.engine.model.importing import load_pretrained
    from headrace_trainer.engine.parallel import join_gang
    from headrace_trainer.engine.sampling import Sampling
    from headrace_trainer.formats.huggingface.files import bring_pretrained
    from headrace_trainer.storage import open_uri

    torch.set_num_threads(os.cpu_count() or 1)
    folder_of_model = open_uri(str(folder / "model"), Storage())
    with join_gang(ONE_RANK, rank=0) as gang:
        source = bring_pretrained(folder_of_model, folder / "base", field="base.uri", check=lambda architecture: None)
        model = build_model(
            source.architecture,
            gang=gang,
            vocab_size=source.vocab_size,
            sequence_length=LENGTH,
            precision=Precision.FP32,
        )
        load_pretrained(model, source)
        asked = [Prompt(id=str(i), tokens=ids) for i, ids in enumerate(prompts())]
        greedy = Sampling(max_new_tokens=LONG, temperature=0)
        time_generation(lambda: [c.tokens for c in generate(model, asked, greedy, gang=gang)])


def generate_transformers(_: str, folder: Path) -> None:
    """Tokens by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    rows = prompts()
    ids = torch.tensor([[0] * (PROMPT_TOKENS - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (PROMPT_TOKENS - len(row)) + [1] * len(row) for row in rows])
    settings = {"max_new_tokens": LONG, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    time_generation(lambda: model.generate(ids, attention_mask=mask, **settings)[:, PROMPT_TOKENS:].tolist())


def prompts() -> list[list[int]]:
    """16 of different lengths."""
    draw = random.Random(2)
    return [[draw.randrange(4, 260) for _ in range(PROMPT_TOKENS - i)] for i in range(BATCH)]


def time_generation(act: Callable[[], list[list[int]]]) -> None:
    """Generate several times, and print the best; what was generated goes along, to be compared."""
    say_ready()
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        tokens = act()
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"samples": BATCH * LONG, "seconds": min(seconds[1:]), "tokens": tokens}))


def train_ours(case: str, folder: Path) -> None:
    """One rank of the stage; prints the seconds of a step and its samples."""
    import torch

    from headrace_api.contract import ResolvedStage
    from headrace_trainer.stage import StageContext, run_stage
    from headrace_trainer.stages.rl.stage import run_rl  # noqa: F401  imported before memory is looked at

    kind = {"sft": "sft", "sft packed": "sft", "dpo": "dpo", "grpo": "rl"}[case]
    torch.set_num_threads(os.cpu_count() or 1)
    block: dict[str, Any] = {
        "base": {"uri": str(folder / "model")},
        "data": {"sources": [{"uri": str(folder / "records.jsonl")}]},
        "sequenceLength": LENGTH,
        "globalBatchSize": BATCH,
        "microBatchSize": MICRO,
        "precision": "fp32",
        "schedule": {"learningRate": 1e-5, "decay": "constant"},
        "samples": {"count": 0},
    }
    if case in ("sft", "sft packed"):
        block |= {"packing": case == "sft packed"}
        if case == "sft packed":
            block |= {"globalBatchSize": BATCH // 4, "microBatchSize": 1}
    if case == "grpo":
        block |= {
            "rewards": [{"rule": {"regex": {"pattern": ANSWER}}}],
            "promptsPerIteration": BATCH // GROUP,
            "groupSize": GROUP,
            "maxNewTokens": NEW_TOKENS,
            "epochs": 1 / GROUP,
            "kl": {"coefficient": 0.04},
        }
    resolved = ResolvedStage.model_validate(
        {
            "run": "posttrain",
            "stage": {"name": kind, kind: block},
            "attempt": 1,
            "seed": 1,
            "hash": "d" * 64,
            "inputs": {},
            "storage": {"uri": str(folder / "storage")},
            "outputUri": str(folder / "storage" / kind),
        }
    )
    ctx, clock = StageContext(resolved=resolved, scratch=folder / "scratch"), Clock()
    report = ctx.report

    def noted(**fields: Any) -> None:
        if fields.get("done"):
            clock.tick()
        report(**fields)

    ctx.report = noted  # type: ignore[method-assign]
    say_ready()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    run_stage(ctx)
    history = [json.loads(line) for line in (folder / "storage" / kind / "history.jsonl").read_text().splitlines()]
    samples = STEPS * BATCH / len(history)
    print(json.dumps({"samples": samples, "seconds": clock.seconds_per_step, "steps": len(clock.ends)}))


# TRL --------------------------------------------------------------------------------------------------------------


def train_trl(case: str, folder: Path) -> None:
    """The same by TRL."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TRL_EXPERIMENTAL_SILENCE": "1"}
    import re

    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    clock = Clock()

    class Noted(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    settings: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": BATCH // MICRO,
        "max_steps": STEPS,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    common = {
        "model": model,
        "train_dataset": Dataset.from_list(rows),
        "processing_class": tokenizer,
        "callbacks": [Noted()],
    }
    say_ready()
    if case == "dpo":
        config = trl.DPOConfig(**settings, max_length=LENGTH, precompute_ref_log_probs=True)
        trainer: Any = trl.DPOTrainer(args=config, **common)
    elif case == "grpo":
        sizes = {"num_generations": GROUP, "max_completion_length": NEW_TOKENS}
        config = trl.GRPOConfig(**settings, **sizes, beta=0.04, loss_type="grpo")

        def reward(completions: list[Any], **_: Any) -> list[float]:
            return [float(re.search(ANSWER, c[0]["content"]) is not None) for c in completions]

        trainer = trl.GRPOTrainer(args=config, reward_funcs=reward, **common)
    else:
        config = trl.SFTConfig(**settings, max_length=LENGTH, assistant_only_loss=True, packing=False)
        trainer = trl.SFTTrainer(args=config, **common)
    trainer.train()
    print(json.dumps({"samples": BATCH, "seconds": clock.seconds_per_step, "steps": len(clock.ends)}))


def say_ready() -> None:
    """Everything is imported: memory counts from here."""
    print("ready", flush=True)


# Comparing --------------------------------------------------------------------------------------------------------


def measure(side: str, case: str, folder: Path) -> Run:
    """Run one side's program.

    Raises:
        RuntimeError: it failed.
    """
    program = [sys.executable, "-m", "benchmarks.posttrain", "--side", side, "--case", case, "--folder", str(folder)]
    held: list[int] = []
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        errors: list[str] = []
        reading = threading.Thread(target=lambda stream: errors.extend(stream), args=(process.stderr,))
        reading.start()
        ended = threading.Event()
        watching = threading.Thread(target=watch, args=(process.pid, held, ended))
        said = ""
        for line in process.stdout:
            if line.strip() == "ready":
                watching.start()
            elif line.startswith('{"samples"'):
                said = line
        code = process.wait()
        ended.set()
        reading.join()
    if code or not said:
        raise RuntimeError(f"{side}, {case}: exit code {code}: {''.join(errors)[-3000:]}")
    found = json.loads(said)
    return Run(
        samples_per_second=found["samples"] / found["seconds"],
        extra_bytes=max(held) - held[0],
        tokens=found.get("tokens"),
    )


def watch(pid: int, held: list[int], ended: threading.Event) -> None:
    """Note what a process and its children hold, several times a second."""
    while True:
        used = 0
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            for one in (process, *process.children(recursive=True)):
                used += one.memory_full_info().pss
        if used:
            held.append(used)
        if ended.wait(0.1):
            return


def compare(case: str, rounds: int) -> Outcome:
    """Both sides in turns."""
    runs: dict[str, list[Run]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as name:
        shared = Path(name)
        write_model(shared / "model")
        (shared / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records(case)))
        for i in range(rounds):
            for side in ("ours", "trl") if i % 2 == 0 else ("trl", "ours"):
                with tempfile.TemporaryDirectory() as own:
                    for file in ("model", "records.jsonl"):
                        (Path(own) / file).symlink_to(shared / file)
                    runs[side].append(measure(side, case, Path(own)))
    if runs["ours"][0].tokens != runs["trl"][0].tokens:
        raise RuntimeError(f"{case}: the two sides generated different tokens")
    speeds = {side: tuple(run.samples_per_second for run in found) for side, found in runs.items()}
    medians = {
        side: Run(
            samples_per_second=statistics.median(speeds[side]),
            extra_bytes=round(statistics.median(run.extra_bytes for run in found)),
        )
        for side, found in runs.items()
    }
    return Outcome(case=case, ours=medians["ours"], trl=medians["trl"], all_ours=speeds["ours"], all_trl=speeds["trl"])


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as Markdown."""
    lines = ["| stage | samples/s | TRL's | times TRL's | MB | TRL's | times TRL's |", "|" + "---|" * 7]
    for o in outcomes:
        speeds = [f"{run.samples_per_second:.2f}" for run in (o.ours, o.trl)]
        sizes = [f"{run.extra_bytes / 1e6:.0f}" for run in (o.ours, o.trl)]
        lines.append("| " + " | ".join([o.case, *speeds, f"{o.speed:.2f}", *sizes, f"{o.memory:.2f}"]) + " |")
    return "\n".join(lines)


SIDES: dict[str, tuple[Callable[[str, Path], None], Callable[[str, Path], None]]] = {
    "ours": (train_ours, generate_ours),
    "trl": (train_trl, generate_transformers),
}
"""What trains, and what generates."""


def main() -> int:
    """Measure, print a table, write JSON; 1 where a stage is not as fast, or takes more memory, than it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="all if left out")
    parser.add_argument("--rounds", type=int, default=3, help="programs of each side")
    parser.add_argument("--out", type=Path, default=RESULTS / "posttrain.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        (case,) = args.case
        SIDES[args.side][case == GENERATION](case, args.folder)
        return 0
    import torch
    import transformers
    import trl

    outcomes = []
    for case in args.case or CASES:
        outcomes.append(compare(case, args.rounds))
        print(table(outcomes[-1:]), flush=True)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.posttrain", *sys.argv[1:]]),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[1],
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)}
        | {"python": platform.python_version()},
        "limit": LIMIT,
        "outcomes": [asdict(o) | {"speed": o.speed, "memory": o.memory} for o in outcomes],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table(outcomes)}\n\nwritten to {args.out}")
    return int(not all(o.is_enough for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
