"""What an rl stage may say, and what it means."""

from typing import Any

import pytest
from pydantic import ValidationError

from headrace_api.stages import Rl
from headrace_api.stages.rl import Estimator

RULE = {"rule": {"exactMatch": {}}}


def rl(**fields: Any) -> Rl:
    block = {
        "from": {"model": "sft"},
        "data": {"sources": [{"uri": "/prompts.jsonl"}]},
        "rewards": [RULE],
    } | fields
    return Rl.model_validate(block)


def test_an_iteration_has_its_steps() -> None:
    block = rl(promptsPerIteration=4, groupSize=8, globalBatchSize=16, epochsPerIteration=3)
    assert block.answers_per_iteration == 32
    assert block.steps_per_iteration == 6


@pytest.mark.parametrize(
    ("fields", "estimator"),
    [
        ({}, Estimator.K3),
        ({"algorithm": "rloo"}, Estimator.K1),
        ({"algorithm": "ppo"}, Estimator.K1),
        ({"kl": {"coefficient": 0.1, "estimator": "k2"}}, Estimator.K2),
    ],
)
def test_the_divergence_is_estimated_as_is_usual(fields: dict[str, Any], estimator: Estimator) -> None:
    assert rl(**fields).estimator is estimator


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rewards": []}, "rewards"),
        ({"rewards": [{}]}, "set either rule or model"),
        ({"rewards": [{"rule": {"exactMatch": {}}, "model": {}}]}, "set either rule or model"),
        ({"rewards": [{"rule": {}}]}, "set exactly one of exactMatch"),
        ({"rewards": [{"rule": {"exactMatch": {}, "numeric": {}}}]}, "set exactly one of exactMatch"),
        ({"rewards": [{"rule": {"regex": {"pattern": "("}}}]}, "is not a regular expression"),
        ({"rewards": [{"rule": {"jsonSchema": {"schema": "{]"}}}]}, "is not JSON"),
        ({"rewards": [{"rule": {"jsonSchema": {"schema": "[]"}}}]}, "is not a JSON object"),
        ({"rewards": [{"model": {}}]}, "has a model only with from.reward"),
        ({"from": {"model": "sft", "reward": "rm"}}, "is read only by a model in rewards"),
        ({"globalBatchSize": 48}, "must divide promptsPerIteration x groupSize, 64"),
        ({"groupSize": 1, "globalBatchSize": 8}, "use 2 or more, or ppo"),
        ({"maxNewTokens": 1024}, "must be below sequenceLength"),
        ({"kl": {"target": 6}}, "set coefficient above 0"),
        ({"algorithm": "ppo", "loss": "gspo"}, "is of grpo"),
        ({"temperature": 0}, "temperature"),
        ({"data": {"sources": [{"uri": "/p.jsonl"}], "validation": {"fraction": 0.1}}}, "validation"),
        ({"packing": True}, "packing"),
        ({"from": {"reward": "rm"}, "rewards": [{"model": {}}]}, "set either from.model"),
        ({"base": {"uri": "/llama"}}, "set either from.model"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        rl(**fields)
    assert said in str(refused.value)


def test_a_model_from_elsewhere_may_be_judged_by_an_earlier_stage() -> None:
    block = rl(base={"uri": "/llama"}, rewards=[{"model": {}}], **{"from": {"reward": "rm"}})
    assert block.model_stage is None
    assert block.inputs() == {"reward": "rm"}


def test_ppo_needs_no_group() -> None:
    assert rl(algorithm="ppo", groupSize=1, globalBatchSize=8).answers_per_iteration == 8
