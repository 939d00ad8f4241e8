"""Reinforcement learning, whole: prompts and a rule in, a model whose answers follow the rule out."""

import os
import random
import shutil
import signal
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from torch.distributed.checkpoint import FileSystemReader

from headrace_api.contract import ResolvedStage
from headrace_trainer.errors import UserError
from trainer.engine.gangs import DP2, PP2, TP1, TP2, Ended, gang
from trainer.posttrain.chain import Base, history, pretrained, reference, resolved, stage_rank, write_records

VOWELS = {"regex": {"pattern": "^[ ]*[aeiou]"}}
"""An answer that begins with a vowel."""
WORDS = ("lamp", "storm", "boat", "gull", "wall", "horn", "oil", "fog", "map", "beach", "page", "deck")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return pretrained(tmp_path_factory.mktemp("base"))


def rl(base: Base, folder: Path, layout: dict[str, int] = TP1, *, attempt: int = 1, **fields: Any) -> ResolvedStage:
    prompts = [{"prompt": f"Say something of the {word}: "} for word in WORDS]
    data = write_records(folder / "prompts.jsonl", prompts)
    block = {
        "from": {"model": "base"},
        "data": {"sources": [{"uri": str(data)}]},
        "rewards": [{"rule": VOWELS}],
        "epochs": 18,
        "promptsPerIteration": 6,
        "groupSize": 8,
        "globalBatchSize": 48,
        "microBatchSize": 12,
        "sequenceLength": 32,
        "maxNewTokens": 3,
        "precision": "fp32",
        "schedule": {"learningRate": 3e-3, "decay": "constant"},
        "checkpoint": {"every": 4},
        "parallelism": {"tensor": layout["tensor"], "pipeline": layout["pipeline"]},
    } | fields
    return resolved(
        base.storage.model_copy(update={"uri": str(folder / "storage")}),
        "rl",
        {"rl": block},
        inputs={"model": base.model},
        attempt=attempt,
        ranks=layout["tensor"] * layout["pipeline"] * layout["data"],
    )


def run(stage: ResolvedStage, folder: Path, **trouble: Any) -> list[Ended]:
    return gang(rl_rank, stage.stage.compute.world, stage, folder, trouble)


def trained(stage: ResolvedStage, folder: Path, **trouble: Any) -> list[dict[str, Any]]:
    ended = run(stage, folder, **trouble)
    assert not any(e.error for e in ended), ended
    return history(stage)


def rl_rank(rank: int, world: int, stage: ResolvedStage, folder: Path, trouble: dict[str, Any]) -> Any:
    """One rank of the stage. ``die_at``: the last rank is killed once it has done as many steps; ``die_drawn``: once the
    answers of this iteration are there, before they are trained on; ``shuffled``: rewards go to other answers."""
    from headrace_trainer.stages.rl.rollouts import Rollouts

    take, all_of = Rollouts._take, Rollouts._all

    def take_or_die(self: Any, iteration: int, answers: Any) -> None:
        take(self, iteration, answers)
        if iteration == trouble.get("die_drawn") and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def shuffled(self: Any, mine: Any) -> Any:
        answers = all_of(self, mine)
        scores = [a.scores for a in answers]
        random.Random(len(self.answers) and int(sum(len(a.tokens) for a in self.answers))).shuffle(scores)
        return [replace(a, scores=s) for a, s in zip(answers, scores, strict=True)]

    Rollouts._take = take_or_die  # type: ignore[method-assign]
    if trouble.get("shuffled"):
        Rollouts._all = shuffled  # type: ignore[method-assign]
    return stage_rank(rank, world, stage, folder, trouble.get("die_at"))


def mean(records: list[dict[str, Any]], figure: str = "reward") -> float:
    return sum(r[figure] for r in records) / len(records)


@pytest.mark.parametrize(
    "algorithm",
    [
        {"algorithm": "grpo"},
        {"algorithm": "rloo"},
        {"algorithm": "ppo", "kl": {"coefficient": 0.01}, "ppo": {"missingEosPenalty": 0}},
    ],
    ids=["grpo", "rloo", "ppo"],
)
def test_answers_come_to_follow_the_rule(base: Base, tmp_path: Path, algorithm: dict[str, Any]) -> None:
    """1 is the most that an answer can have; 1,728 answers are drawn."""
    records = trained(rl(base, tmp_path, **algorithm, checkpoint={"every": 1000}), tmp_path)
    assert len(records) == 36
    assert records[0]["reward"] < 0.4
    assert mean(records[-4:]) > 0.9
    assert records[0]["train_rollout_logprob_abs_diff"] < 1e-4
    assert records[0]["val/ratio"] == pytest.approx(1, abs=1e-4)
    assert "regex 1" in (tmp_path / "storage/rl/answers.md").read_text()
    # What comes next wants a language model, whatever learned beside it.
    kept = FileSystemReader(tmp_path / "storage/rl/checkpoint").read_metadata().state_dict_metadata
    assert "output_layer.weight" in kept or "embedding.word_embeddings.weight" in kept
    assert not [key for key in kept if "scalar_head" in key]


def test_rewards_of_other_answers_teach_nothing(base: Base, tmp_path: Path) -> None:
    records = trained(rl(base, tmp_path, epochs=8), tmp_path, shuffled=True)
    assert mean(records[-4:]) < 0.45


def test_an_epoch_has_each_prompt_as_often_as_its_source_weighs(base: Base, tmp_path: Path) -> None:
    prompts = write_records(tmp_path / "more.jsonl", [{"prompt": f"Name the {word}: "} for word in WORDS])
    data = {"sources": [{"uri": str(prompts), "weight": 0.5}]}
    sizes = {"promptsPerIteration": 2, "groupSize": 2, "globalBatchSize": 4, "microBatchSize": 4, "epochs": 1}
    assert len(trained(rl(base, tmp_path, data=data, **sizes), tmp_path)) == len(WORDS) // 2 // 2


TWO_STEPS = {"epochs": 2, "globalBatchSize": 24, "kl": {"coefficient": 0.05}, "ppo": {"missingEosPenalty": 0}}
"""Two steps an iteration, four iterations."""


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_answers_and_losses_do_not_depend_on_the_layout(base: Base, tmp_path: Path, algorithm: str) -> None:
    layouts = {"one": TP1, "TP2": TP2, "PP2": PP2} | ({"DP2": DP2} if algorithm == "ppo" else {})
    found = {
        name: trained(rl(base, tmp_path / name, layout, algorithm=algorithm, **TWO_STEPS), tmp_path / name)
        for name, layout in layouts.items()
    }
    for name, records in found.items():
        for figure in ("loss", "reward", "kl", "entropy", "objective/kl", "completions/mean_length"):
            expected = [r[figure] for r in found["one"]]
            assert [r[figure] for r in records] == pytest.approx(expected, abs=1e-5, rel=0), (name, figure)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_killed_stage_goes_on_bit_for_bit(base: Base, tmp_path: Path, algorithm: str) -> None:
    """Killed at random, and then between drawing answers and training on them; checkpoints are from the middle too."""
    settings: dict[str, Any] = TWO_STEPS | {"algorithm": algorithm, "epochs": 3, "epochsPerIteration": 2}
    settings |= {"checkpoint": {"every": 1}, "kl": {"coefficient": 0.05, "target": 0.5, "horizon": 100}}
    layout = DP2 if algorithm == "ppo" else TP1
    whole = trained(rl(base, tmp_path / "whole", layout, **settings), tmp_path / "whole")
    assert len({r["objective/kl_coef"] for r in whole}) > 2
    seed = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(10**6)))
    print(f"HEADRACE_TEST_SEED={seed}")
    die_at = random.Random(seed).randrange(2, 14)
    killed = run(rl(base, tmp_path, layout, **settings), tmp_path, die_at=die_at)
    assert killed[-1].exit_code == -signal.SIGKILL
    killed = run(rl(base, tmp_path, layout, attempt=2, **settings), tmp_path, die_drawn=4)
    assert killed[-1].exit_code == -signal.SIGKILL
    resumed = trained(rl(base, tmp_path, layout, attempt=3, **settings), tmp_path)
    assert [r["loss_hex"] for r in resumed] == [r["loss_hex"] for r in whole]
    assert [r["reward"] for r in resumed] == [r["reward"] for r in whole]


def test_a_rail_goes_back_once_and_then_waits_for_people(base: Base, tmp_path: Path) -> None:
    """The entropy falls below the limit again after the weights from before were taken."""
    rails = {"minEntropy": {"limit": 5.3, "then": "rollBack"}}
    (ended,) = run(rl(base, tmp_path, epochs=6, checkpoint={"every": 1}, rails=rails), tmp_path)
    assert ended.error == "UserError"
    assert "paused after step" in ended.message
    assert "entropy is" in ended.message
    assert "below rails.minEntropy.limit, 5.3, again after going back" in ended.message
    assert "raise temperature" in ended.message
    # People move the limit, and it goes on from there.
    step = int(ended.message.split("paused after step ")[1].split(",")[0])
    records = trained(rl(base, tmp_path, epochs=6, checkpoint={"every": 1}, attempt=2), tmp_path)
    assert len(records) == 12
    assert any("rolled_back" in r for r in records[:step])


def test_a_reward_model_judges(base: Base, tmp_path: Path) -> None:
    draw = random.Random(0)
    words = {True: ("a", "eel", "ice", "oil", "use"), False: ("sea", "to", "with", "boat", "the")}
    pairs = [
        {
            "prompt": f"Say something of the {w}: ",
            "chosen": draw.choice(words[True]),
            "rejected": draw.choice(words[False]),
        }
        for w in WORDS * 12
    ]
    data = write_records(tmp_path / "pairs.jsonl", pairs)
    block = {
        "from": {"model": "base"},
        "data": {"sources": [{"uri": str(data)}]},
        "sequenceLength": 64,
        "globalBatchSize": 8,
        "microBatchSize": 4,
        "precision": "fp32",
        "schedule": {"learningRate": 2e-3, "decay": "constant"},
    }
    storage = base.storage.model_copy(update={"uri": str(tmp_path / "storage")})
    stage = resolved(storage, "rm", {"reward": block}, inputs={"model": base.model})
    (ended,) = gang(stage_rank, 1, stage, tmp_path)
    assert not ended.error, ended
    judged_by: dict[str, Any] = {
        "from": {"model": "base", "reward": "rm"},
        "rewards": [{"model": {"clip": 5}}, {"rule": VOWELS, "weight": 0.1}],
    }
    judged = rl(base, tmp_path, epochs=6, **judged_by)
    judged = judged.model_copy(update={"inputs": judged.inputs | {"reward": reference(stage, ended)}})
    records = trained(judged, tmp_path)
    assert mean(records[-3:], "rewards/model/mean") > mean(records[:3], "rewards/model/mean") + 0.5
    for r in records:
        assert r["reward"] == pytest.approx(r["rewards/model/mean"] + 0.1 * r["rewards/regex/mean"], abs=1e-6)

    other = tmp_path / "other"
    shutil.copytree(tmp_path / "storage/rm/tokenizer", other / "tokenizer")
    tokenizer = Tokenizer.from_file(str(other / "tokenizer/tokenizer.json"))
    tokenizer.add_special_tokens(["<|another|>"])
    tokenizer.save(str(other / "tokenizer/tokenizer.json"))
    from headrace_trainer.stages.rl.stage import _reward_model

    start: Any = SimpleNamespace(tokenizer=tmp_path / "storage/rm/tokenizer")
    config: Any = judged.stage.rl
    with pytest.raises(UserError, match="its tokenizer differs from the model's in 1 tokens: train the reward model"):
        _reward_model(other, None, config, start)  # type: ignore[arg-type]


def test_scores_that_are_not_numbers_are_counted_and_bounded(base: Base, tmp_path: Path) -> None:
    from headrace_trainer.stages.rl.answers import Answer
    from headrace_trainer.stages.rl.rollouts import Parts, Rollouts
    from headrace_trainer.stages.rl.stage import worth_of

    sizes = {"promptsPerIteration": 2, "groupSize": 4, "globalBatchSize": 8, "microBatchSize": 4}
    config = rl(base, tmp_path, **sizes, maxFailedShare=0.2).stage.rl
    assert config is not None
    parts: Any = SimpleNamespace(order=SimpleNamespace(packs_per_epoch=2), worth=worth_of(config), seed=0)
    assert set(vars(parts)) <= {field.name for field in fields(Parts)}
    rollouts = Rollouts(config, None, parts)  # type: ignore[arg-type]

    def take(*scores: float) -> list[float]:
        zeros = np.zeros(2, np.float32)
        answers = [
            Answer(prompt=np.ones(1), tokens=np.ones(2), stopped=True, sampled=zeros, log_probs=zeros, scores=(s,))
            for s in scores
        ]
        rollouts._take(3, answers)
        return [float(rollouts.sample(3 * 8 + i).advantages[0]) for i in range(8)]

    nan = float("nan")
    advantages = take(1, 0, nan, 1, 0, 0, 0, 1)
    rollouts._check_rewards()
    assert advantages[2] == pytest.approx(0, abs=1e-6)
    assert advantages[0] > 0 > advantages[1]
    assert rollouts.figures()["rewards/failed"] == 1
    take(1, nan, nan, 1, 0, 0, 0, 1)
    with pytest.raises(UserError, match=r"regex: 25.0% of iteration 3's scores are not numbers \(answer 1: nan\)"):
        rollouts._check_rewards()


def test_answers_travel_in_text() -> None:
    from headrace_trainer.stages.rl.answers import Answer, dumps, loads

    draw = np.random.default_rng(0)
    answers = []
    for length in (1, 4, 2):
        some = draw.standard_normal((3, length)).astype(np.float32)
        answers.append(
            Answer(
                prompt=draw.integers(0, 99, 5),
                tokens=draw.integers(0, 99, length),
                stopped=length > 1,
                sampled=some[0],
                log_probs=some[1],
                values=some[2],
                scores=(1.0, float("nan")),
                timed_out=length,
            )
        )
    for one, other in zip(answers, loads(dumps(answers)), strict=True):
        for name in ("prompt", "tokens", "sampled", "log_probs", "values", "scores"):
            assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name == "scores"), name
        assert (one.stopped, one.timed_out, other.reference) == (other.stopped, other.timed_out, None)


@pytest.mark.parametrize(
    ("name", "figure", "good", "bad"),
    [
        ("maxKl", "objective/kl", 4.9, 5.1),
        ("minEntropy", "entropy", 5.1, 4.9),
        ("maxLengthShare", "completions/clipped_ratio", 5, 6),
        ("maxZeroVarianceShare", "frac_reward_zero_std", 5, 6),
        ("maxMismatch", "train_rollout_logprob_abs_diff", 5, 6),
    ],
)
@pytest.mark.parametrize("then", ["pause", "rollBack"])
def test_every_rail_says_what_went_too_far(name: str, figure: str, good: float, bad: float, then: str) -> None:
    from headrace_api.stages.rl import Rails
    from headrace_trainer.stages.rl.rails import WINDOW, alarm

    rails = Rails.model_validate({name: {"limit": 5, "then": then}})
    assert alarm([{figure: good}], rails) is None
    assert alarm([{figure: bad}, {"other": 1.0}], rails) is None
    found = alarm([{figure: good}, {figure: bad}], rails)
    assert found is not None
    assert f"{figure} is {bad:.4g}" in found.reason
    assert f"rails.{name}.limit, 5" in found.reason
    assert found.roll_back is (then == "rollBack")
    again = alarm([{figure: bad, "rolled_back": True}, {figure: bad}], rails)
    assert again is not None
    assert not again.roll_back
    later = alarm([{figure: bad, "rolled_back": True}, *([{figure: good}] * WINDOW), {figure: bad}], rails)
    assert later is not None
    assert later.roll_back is (then == "rollBack")
