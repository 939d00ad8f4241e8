"""Whether each stage after pretraining teaches what it is there to teach: ``python -m benchmarks.learns``.

One ``TrainingRun``, run as people run it. A question shows three or four digits, as in ``Reverse 3 1 2``; the right answer
is a list of them from the last to the first, ``[2, 1, 3]``. A hash of a question's digits says whether it is held out, in
every file alike. Each lesson stands beside its ablation: the same stage on the same questions with answers, sides or
rewards that belong to other questions. What is learned must show on held-out questions, and only without the ablation.

- ``sft`` from a base model: exact match, greedily.
- ``grpo``, ``rloo``, ``ppo`` from a model that writes half of its answers without brackets: the rule's reward, which is at
  most 1, and exact match. The divergence from the starting model is part of the table.
- ``dpo`` from the same model, on pairs that prefer the brackets: accuracy of the implicit rewards, and the loss at step 1.
- ``reward`` from the ``sft`` model, on pairs whose other side has two digits exchanged: accuracy.
"""

import argparse
import datetime
import hashlib
import itertools
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

REPO = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
SEED = 1234
HELD_OUT_ONE_IN = 6
LENGTH = 128
ALGORITHMS = ("grpo", "rloo", "ppo")
LESSONS = ("sft", *ALGORITHMS, "dpo", "reward")
KL_BOUND = 20.0
"""Nats that an answer may move from the model that reinforcement learning starts from."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is taught."""

    pretrain_tokens: str
    sft_epochs: float
    rl_answers: int
    """Drawn in all, by each algorithm."""
    pairs: int
    asked: int
    """Held-out questions."""


SIZES = {
    "full": Size(pretrain_tokens="400k", sft_epochs=4, rl_answers=6144, pairs=1200, asked=200),
    "small": Size(pretrain_tokens="50k", sft_epochs=4, rl_answers=3072, pairs=600, asked=60),
}


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a stage taught."""

    name: str
    measured: str
    before: float
    after: float
    ablation: float
    """The same after the ablation."""
    passed: bool
    samples: int
    """Demonstrations, answers or pairs, each as often as it was trained on."""
    notes: dict[str, float]


# The task ---------------------------------------------------------------------------------------------------------


def all_digits() -> list[tuple[int, ...]]:
    """Every question's digits, in an order of their own."""
    found = [digits for length in (3, 4) for digits in itertools.permutations(range(10), length)]
    random.Random(SEED).shuffle(found)
    return found


def is_held_out(digits: Sequence[int]) -> bool:
    """By the question alone."""
    return hashlib.sha256(bytes(digits)).digest()[0] % HELD_OUT_ONE_IN == 0


def question(digits: Sequence[int]) -> list[dict[str, str]]:
    """As a conversation."""
    return [{"role": "user", "content": "Reverse " + " ".join(map(str, digits))}]


def answer(digits: Sequence[int]) -> str:
    """The right one."""
    return str([*reversed(digits)])


def said(text: str) -> list[dict[str, str]]:
    """An answer, as a conversation goes on."""
    return [{"role": "assistant", "content": text}]


def exchanged(digits: Sequence[int]) -> tuple[int, ...]:
    """Two neighbours in each other's place."""
    place = hashlib.sha256(bytes(digits)).digest()[1] % (len(digits) - 1)
    changed = [*digits]
    changed[place], changed[place + 1] = changed[place + 1], changed[place]
    return tuple(changed)


def shifted(rows: Sequence[Any]) -> list[Any]:
    """Each in the place of the one before."""
    return [*rows[1:], *rows[:1]]


def write_files(folder: Path, size: Size) -> None:
    """All records, and those of the ablations."""
    digits = all_digits()
    training, held_out = [d for d in digits if not is_held_out(d)], [d for d in digits if is_held_out(d)][: size.asked]
    draw = random.Random(SEED)

    def demonstrations(answers: Iterable[str]) -> Iterator[dict[str, Any]]:
        return ({"messages": question(d) + said(a)} for d, a in zip(training, answers, strict=True))

    def sides(rows: Iterable[tuple[int, ...]], worse: Callable[[tuple[int, ...]], str]) -> list[dict[str, Any]]:
        return [{"prompt": question(d), "chosen": said(answer(d)), "rejected": said(worse(d))} for d in rows]

    def either(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        turned = (p | {"chosen": p["rejected"], "rejected": p["chosen"]} if draw.random() < 0.5 else p for p in pairs)
        return [*turned]

    right = [answer(d) for d in training]
    bare = [a.strip("[]").replace(",", "") if draw.random() < 0.5 else a for a in right]
    files: dict[str, Iterable[dict[str, Any]]] = {
        "sft": demonstrations(right),
        "sft-ablation": demonstrations(shifted(right)),
        "mixed": demonstrations(bare),
        "prompts": ({"prompt": question(d), "answer": a} for d, a in zip(training, right, strict=True)),
        "prompts-ablation": (
            {"prompt": question(d), "answer": a} for d, a in zip(training, shifted(right), strict=True)
        ),
        "held-out": ({"prompt": question(d), "completion": said(answer(d))} for d in held_out),
    }
    kinds: dict[str, Callable[[tuple[int, ...]], str]] = {
        "dpo": lambda d: answer(d).strip("[]").replace(",", ""),
        "reward": lambda d: answer(exchanged(d)),
    }
    for kind, worse in kinds.items():
        pairs = sides(training[: size.pairs], worse)
        files |= {kind: pairs, f"{kind}-ablation": either(pairs), f"{kind}-held-out": sides(held_out, worse)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# The run ----------------------------------------------------------------------------------------------------------


def manifest(records: Path, text: Path, size: Size, lessons: Sequence[str]) -> dict[str, Any]:
    """One run with every stage."""

    def data(name: str, held_out: str | None = None) -> dict[str, Any]:
        validation = {"validation": {"uri": str(records / f"{held_out}.jsonl")}} if held_out else {}
        return {"sources": [{"uri": str(records / f"{name}.jsonl")}], **validation}

    def block(model: str, rate: float, **fields: Any) -> dict[str, Any]:
        schedule = {"learningRate": rate, "warmup": 10}
        common = {"sequenceLength": LENGTH, "precision": "fp32", "schedule": schedule}
        return {"from": {"model": model}, **common, **fields}

    def demonstrated(name: str, *, model: str = "base", epochs: float = size.sft_epochs) -> dict[str, Any]:
        return block(model, 3e-3, data=data(name), epochs=epochs, globalBatchSize=8, microBatchSize=8)

    def paired(name: str, model: str, held_out: str, rate: float, **fields: Any) -> dict[str, Any]:
        fields |= {"data": data(name, held_out), "globalBatchSize": 16, "microBatchSize": 16}
        return block(model, rate, epochs=2, **fields)

    def rewarded(name: str, algorithm: str) -> dict[str, Any]:
        prompts, group = 16, 8
        iterations = size.rl_answers // (prompts * group)
        return block(
            "mixed",
            1e-3,
            data=data(name),
            algorithm=algorithm,
            rewards=[{"rule": {"exactMatch": {}}}],
            promptsPerIteration=prompts,
            groupSize=group,
            globalBatchSize=prompts * group,
            microBatchSize=32,
            epochs=iterations * prompts / sum(not is_held_out(d) for d in all_digits()),
            maxNewTokens=24,
            kl={"coefficient": 0.01},
        )

    def evaluated(model: str) -> dict[str, Any]:
        sets = [{"name": "held-out", "uri": str(records / "held-out.jsonl"), "maxTokens": 24}]
        source = {"model": model, "shards": "tokens"}
        return {"name": f"eval-{model}", "evaluate": {"from": source, "maxTokens": "2k", "exactMatch": sets}}

    stages: list[dict[str, Any]] = [
        {"name": "corpus", "corpus": {"sources": [{"uri": str(text)}], "languages": ["en"]}},
        {"name": "tok", "tokenizer": {"from": {"corpus": "corpus"}, "vocabSize": 1024}},
        {"name": "tokens", "shards": {"from": {"corpus": "corpus", "tokenizer": "tok"}}},
        {
            "name": "base",
            "pretrain": {
                "from": {"shards": "tokens"},
                "model": {"layers": 3, "hiddenSize": 128, "heads": 4, "kvHeads": 4, "ffnHiddenSize": 344},
                "tokens": size.pretrain_tokens,
                "sequenceLength": LENGTH,
                "globalBatchSize": 16,
                "microBatchSize": 16,
                "precision": "fp32",
                "schedule": {"learningRate": 3e-3},
            },
        },
        evaluated("base"),
        {"name": "sft", "sft": demonstrated("sft")},
    ]
    if "sft" in lessons:
        stages += [
            evaluated("sft"),
            {"name": "sft-ablation", "sft": demonstrated("sft-ablation")},
            evaluated("sft-ablation"),
        ]
    if {*lessons} - {"sft", "reward"}:
        stages += [{"name": "mixed", "sft": demonstrated("mixed", model="sft", epochs=1)}, evaluated("mixed")]
    for algorithm in (a for a in ALGORITHMS if a in lessons):
        for name, prompts in ((algorithm, "prompts"), (f"{algorithm}-ablation", "prompts-ablation")):
            stages += [{"name": name, "rl": rewarded(prompts, algorithm)}, evaluated(name)]
    for name in ("dpo", "dpo-ablation") if "dpo" in lessons else ():
        stages += [{"name": name, "dpo": paired(name, "mixed", "dpo-held-out", 2e-4)}, evaluated(name)]
    for name in ("reward", "reward-ablation") if "reward" in lessons else ():
        stages.append({"name": name, "reward": paired(name, "sft", "reward-held-out", 3e-4)})
    spec = {"seed": SEED, "stages": stages}
    return {"apiVersion": "headrace.dev/v1alpha1", "kind": "TrainingRun", "metadata": {"name": "learns"}, "spec": spec}


# What it taught ---------------------------------------------------------------------------------------------------


class Artifacts:
    """What the stages left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def history(self, stage: str) -> list[dict[str, Any]]:
        """The records of a stage's steps."""
        return [json.loads(line) for line in (self._folder / stage / "history.jsonl").read_text().splitlines()]

    def exact_match(self, stage: str) -> float:
        """The share of held-out questions that a stage's model answers exactly."""
        report = json.loads((self._folder / f"eval-{stage}" / "report.json").read_text())
        return float(report["metrics"]["exactMatch/held-out"])

    def trained(self, stage: str, size: int) -> int:
        """Samples of a stage's steps, ``size`` each."""
        return size * len(self.history(stage))


def lesson(name: str, found: Artifacts, size: Size) -> Lesson:
    """One row of the table."""
    other = f"{name}-ablation"
    if name == "sft":
        before, after, ablation = (found.exact_match(stage) for stage in ("base", "sft", other))
        return Lesson(
            name=name,
            measured="exact match",
            before=before,
            after=after,
            ablation=ablation,
            passed=before < 0.05 and after > 0.9 and ablation < 0.05,
            samples=round(size.sft_epochs * sum(not is_held_out(d) for d in all_digits())),
            notes={},
        )
    if name in ALGORITHMS:
        before, after, ablation = (found.exact_match(stage) for stage in ("mixed", name, other))
        records = found.history(name)
        reward = sum(r["reward"] for r in records[-4:]) / 4
        divergence = max(r["objective/kl"] for r in records)
        return Lesson(
            name=name,
            measured="exact match",
            before=before,
            after=after,
            ablation=ablation,
            passed=after > 0.9 and reward > 0.9 and divergence < KL_BOUND and ablation <= before + 0.05,
            samples=size.rl_answers,
            notes={"reward_at_first": records[0]["reward"], "reward_at_last": reward, "largest_kl_nats": divergence},
        )
    figure = "validation_accuracy" if name == "reward" else "validation_rewards/accuracies"
    after, ablation = (_newest(found.history(stage), figure) for stage in (name, other))
    records, notes = found.history(name), {}
    passed = after > (0.9 if name == "reward" else 0.95) and ablation < 0.75
    if name == "dpo":
        notes = {
            "first_loss_minus_ln_2": records[0]["loss"] - math.log(2),
            "exact_match_before": found.exact_match("mixed"),
        }
        notes |= {"exact_match_after": found.exact_match(name), "exact_match_ablation": found.exact_match(other)}
        passed = passed and abs(notes["first_loss_minus_ln_2"]) < 1e-4
    return Lesson(
        name=name,
        measured="accuracy of held-out pairs",
        before=0.5,
        after=after,
        ablation=ablation,
        passed=passed,
        samples=found.trained(name, 16),
        notes=notes,
    )


def _newest(records: Sequence[dict[str, Any]], figure: str) -> float:
    return float(next(r[figure] for r in reversed(records) if figure in r))


def table(lessons: Sequence[Lesson]) -> str:
    """The rows as Markdown."""
    lines = [
        "| stage | measured on held-out questions | before | after | ablation | samples | passed | besides |",
        "|" + "---|" * 8,
    ]
    for row in lessons:
        besides = ", ".join(f"{name} {value:.3g}" for name, value in row.notes.items())
        figures = [f"{value:.1%}" for value in (row.before, row.after, row.ablation)]
        columns = [row.name, row.measured, *figures, f"{row.samples:,}", "yes" if row.passed else "NO", besides]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main() -> int:
    """Teach, print the table, write JSON; 1 where something was not learned, or its ablation taught it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=LESSONS, action="append", help="all if left out")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument(
        "--home", type=Path, default=REPO / ".headrace" / "learns", help="what is finished there is kept"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "learns.json")
    args = parser.parse_args()
    size, chosen, home = (
        SIZES[args.size],
        [name for name in LESSONS if name in (args.only or LESSONS)],
        args.home.resolve(),
    )
    began = time.monotonic()
    if not (home / "raw" / "text").exists():
        subprocess.run(
            [sys.executable, "-m", "headrace_trainer.stages.corpus.machine_docs", "--out", home / "raw"], check=True
        )
    write_files(home / "records", size)
    run = home / "learns.yaml"
    run.write_text(yaml.safe_dump(manifest(home / "records", home / "raw" / "text", size, chosen), sort_keys=False))
    subprocess.run([sys.executable, "-m", "headrace_cli", "run", run, "--home", home], check=True, cwd=REPO)
    found = Artifacts(home / "runs" / "learns" / "artifacts")
    lessons = [lesson(name, found, size) for name in chosen]
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.learns", *sys.argv[1:]]),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "size": asdict(size),
        "seconds": round(time.monotonic() - began),
        "lessons": [asdict(row) for row in lessons],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table(lessons)}\n\nwritten to {args.out}")
    return int(not all(row.passed for row in lessons))


if __name__ == "__main__":
    sys.exit(main())
