"""TRL's trainers on the same model, tokens and order, as a program: ``python trl_oracle.py TASK.json``.

A program of its own, because Megatron-core changes torch where there is no GPU. In: the task. Out: losses and gradient
norms of every step, as JSON on the last line.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_MODE": "disabled"}

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer


def main(path: Path) -> None:
    """Train as the task says."""
    task = json.loads(path.read_text())
    trainer = TRAINERS[task["kind"]](task)
    trainer.train()
    records = [r for r in trainer.state.log_history if "loss" in r]
    found = {"losses": [r["loss"] for r in records], "norms": [r["grad_norm"] for r in records]}
    print(json.dumps(found | {name: [r.get(name) for r in records] for name in task["figures"]}))


def settings(task: dict[str, Any], folder: str) -> dict[str, Any]:
    """What every trainer is given: AdamW, clipping and a constant rate as in the stage, all examples in order."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": task["batch"],
        "max_steps": task["steps"],
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_length": task["length"],
    }


def sft(task: dict[str, Any]) -> SFTTrainer:
    """Tokens with the mask of what is trained on."""
    rows = [{"input_ids": e["tokens"], "labels": labels(e)} for e in task["examples"]]
    return _Sft(
        model=AutoModelForCausalLM.from_pretrained(task["model"]),
        args=SFTConfig(**settings(task, task["folder"]), packing=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
    )


def labels(example: dict[str, Any]) -> list[int]:
    """Token ids where they are trained on."""
    return [t if m else -100 for t, m in zip(example["tokens"], example["mask"], strict=True)]


def dpo(task: dict[str, Any]) -> DPOTrainer:
    """Pairs of a prompt and two sides."""
    rows = []
    for chosen, rejected in task["examples"]:
        asked = chosen["mask"].index(True)
        rows.append(
            {
                "prompt_ids": chosen["tokens"][:asked],
                "chosen_ids": chosen["tokens"][asked:],
                "rejected_ids": rejected["tokens"][asked:],
            }
        )
    return _Dpo(
        model=AutoModelForCausalLM.from_pretrained(task["model"]),
        ref_model=AutoModelForCausalLM.from_pretrained(task["model"]),
        args=DPOConfig(**settings(task, task["folder"]), beta=0.1, loss_type=["sigmoid"]),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
    )


def orpo(task: dict[str, Any]) -> ORPOTrainer:
    """Pairs of two sides."""
    return _Orpo(
        model=AutoModelForCausalLM.from_pretrained(task["model"]),
        args=ORPOConfig(**settings(task, task["folder"]), beta=task["beta"]),
        train_dataset=sides(task),
        processing_class=padded(task),
    )


def simpo(task: dict[str, Any]) -> CPOTrainer:
    """Pairs of two sides, without the likelihood that CPO adds."""
    return _Simpo(
        model=AutoModelForCausalLM.from_pretrained(task["model"]),
        args=CPOConfig(
            **settings(task, task["folder"]),
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=task["beta"],
            simpo_gamma=task["gamma"],
        ),
        train_dataset=sides(task),
        processing_class=padded(task),
    )


def sides(task: dict[str, Any]) -> Dataset:
    """Both sides of each pair, each whole; the texts are not looked at."""
    rows = []
    for pair in task["examples"]:
        row: dict[str, Any] = {"prompt": "-", "chosen": "-", "rejected": "-"}
        for name, side in zip(("chosen", "rejected"), pair, strict=True):
            row |= {f"{name}_input_ids": side["tokens"], f"{name}_labels": labels(side)}
            row[f"{name}_attention_mask"] = [1] * len(side["tokens"])
        rows.append(row)
    return Dataset.from_list(rows)


def padded(task: dict[str, Any]) -> Any:
    """A tokenizer that can pad."""
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def kto(task: dict[str, Any]) -> KTOTrainer:
    """Single answers, and for each the answer of the one before it in its batch."""
    rows = []
    for example in task["examples"]:
        asked = example["mask"].index(True)
        rows.append(
            {
                "prompt_ids": example["tokens"][:asked],
                "completion_ids": example["tokens"][asked:],
                "label": example["label"],
            }
        )
    size = task["batch"]
    for i, row in enumerate(rows):
        before = i - 1 if i % size else i + size - 1
        row["KL_completion_ids"] = rows[before]["completion_ids"]
    return _Kto(
        model=AutoModelForCausalLM.from_pretrained(task["model"]),
        ref_model=AutoModelForCausalLM.from_pretrained(task["model"]),
        args=KTOConfig(
            **settings(task, task["folder"]),
            beta=task["beta"],
            desirable_weight=task["desirable_weight"],
            undesirable_weight=task["undesirable_weight"],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=padded(task),
    )


def reward(task: dict[str, Any]) -> RewardTrainer:
    """Pairs, each side whole, scored at its last token."""
    import torch

    rows = [{"chosen_ids": c["tokens"], "rejected_ids": r["tokens"]} for c, r in task["examples"]]
    model = AutoModelForSequenceClassification.from_pretrained(task["model"], num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    # Not the end-of-document token: the score is that of the last token that is no padding.
    tokenizer.pad_token = "<|im_start|>"
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor(task["head"]))
    return _Reward(
        model=model,
        args=RewardConfig(
            **settings(task, task["folder"]), center_rewards_coefficient=0.01, pad_token=tokenizer.pad_token
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


class _AsItIs:
    """The examples are tokens already."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


class _Sft(_AsItIs, SFTTrainer):
    pass


class _Dpo(_AsItIs, DPOTrainer):
    pass


class _Reward(_AsItIs, RewardTrainer):
    pass


class _Kto(_AsItIs, KTOTrainer):
    pass


class _Rows:
    """The same of the trainers that tokenize row by row."""

    def tokenize_row(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}


class _Orpo(_Rows, ORPOTrainer):
    pass


class _Simpo(_Rows, CPOTrainer):
    pass


TRAINERS = {"sft": sft, "dpo": dpo, "orpo": orpo, "simpo": simpo, "kto": kto, "reward": reward}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
