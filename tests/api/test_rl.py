"""What an rl stage may say, and what it means."""

from typing import Any

import pytest
from pydantic import ValidationError

from headrace_api.stages import Rl
from headrace_api.stages.rl import Estimator
from headrace_api.stages.rules import ExactMatch, JsonSchema, Numeric, PythonTests, Regex, RuleReward

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
    assert repr(block.steps_per_iteration) == "6"


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
        ({"rewards": [{}]}, "Value error, : 'none': set either rule or model"),
        ({"rewards": [{"rule": {"exactMatch": {}}, "model": {}}]}, "Value error, : 'both': set either rule or model"),
        ({"rewards": [{"rule": {}}]}, "Value error, : 'none': set exactly one of exactMatch"),
        ({"rewards": [{"rule": {"exactMatch": {}, "numeric": {}}}]}, "Value error, : 'exactMatch and numeric': set exactly one of exactMatch"),
        ({"rewards": [{"rule": {"regex": {"pattern": "("}}}]}, "pattern: '(': is not a regular expression: missing )"),
        ({"rewards": [{"rule": {"jsonSchema": {"schema": "{]"}}}]}, "schema: '{]': is not JSON: Expecting property name"),
        ({"rewards": [{"rule": {"jsonSchema": {"schema": "[]"}}}]}, "schema: '[]': is not a JSON object; write one"),
        ({"rewards": [{"rule": {"jsonSchema": {"schema": "{" * 99}}}]}, f"schema: '{'{' * 80}': is not JSON"),
        ({"rewards": [{"rule": {"jsonSchema": {"schema": f'"{"a" * 99}"'}}}]}, f"""schema: '"{"a" * 79}': is not a JSON object"""),
        ({"rewards": [{"model": {}}]}, "rewards: 'no from.reward': has a model only with from.reward"),
        ({"rewards": [RULE, {"model": {}}]}, "rewards: 'no from.reward': has a model only with from.reward"),
        ({"from": {"model": "sft", "reward": "rm"}}, "rewards: 'rm': has a model only with from.reward, and from.reward is read only by"),
        ({"globalBatchSize": 48}, "globalBatchSize: 48: must divide promptsPerIteration x groupSize, 64"),
        ({"groupSize": 1, "globalBatchSize": 8}, "groupSize: 1: grpo and rloo compare an answer with others to the same prompt: use 2 or more, or ppo"),
        ({"algorithm": "rloo", "groupSize": 1, "globalBatchSize": 8}, "groupSize: 1: grpo and rloo compare"),
        ({"maxNewTokens": 1024}, "maxNewTokens: 1024: must be below sequenceLength"),
        ({"kl": {"target": 6}}, "target: 6.0: adapts a coefficient; set coefficient above 0"),
        ({"algorithm": "ppo", "loss": "gspo"}, "loss: 'gspo': is of grpo"),
        ({"algorithm": "rloo", "loss": "dapo"}, "loss: 'dapo': is of grpo"),
        ({"rails": {"maxKl": {"limit": 1, "then": "stop"}}}, "then"),
        ({"temperature": 0}, "temperature"),
        ({"data": {"sources": [{"uri": "/p.jsonl"}], "validation": {"fraction": 0.1}}}, "validation"),
        ({"packing": True}, "packing"),
        ({"from": {"reward": "rm"}, "rewards": [{"model": {}}]}, "set either from.model"),
        ({"base": {"uri": "/llama"}}, "set either from.model"),
    ],
)  # fmt: skip
def test_what_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        rl(**fields)
    assert said in str(refused.value)


def test_a_model_from_elsewhere_may_be_judged_by_an_earlier_stage() -> None:
    block = rl(base={"uri": "/llama"}, rewards=[{"model": {}}], **{"from": {"reward": "rm"}})
    assert block.model_stage is None
    assert block.inputs() == {"reward": "rm"}


@pytest.mark.parametrize(
    "fields",
    [
        {"groupSize": 2, "globalBatchSize": 16},
        {"maxNewTokens": 1023},
        {"kl": {"target": 6, "coefficient": 0.05}},
        {"loss": "dr_grpo"},
        {"algorithm": "rloo"},
        {"from": {"model": "sft", "reward": "rm"}, "rewards": [RULE, {"model": {"clip": 5}, "weight": -0.5}]},
    ],
)
def test_what_is_taken(fields: dict[str, Any]) -> None:
    assert Rl.model_validate(rl(**fields).dump()) == rl(**fields)


def test_a_reward_is_called_by_its_rule_or_a_model() -> None:
    terms = [RULE, {"rule": {"pythonTests": {"seconds": 3}}}, {"model": {}}]
    block = rl(rewards=terms, **{"from": {"model": "sft", "reward": "rm"}})
    assert [term.name for term in block.rewards] == ["exactMatch", "pythonTests", "model"]


@pytest.mark.parametrize(
    ("name", "written", "kind"),
    [
        ("exactMatch", {"column": "wanted"}, ExactMatch),
        ("numeric", {"tolerance": 0.5}, Numeric),
        ("regex", {"pattern": "^a$"}, Regex),
        ("jsonSchema", {"schema": '{"type": "object"}'}, JsonSchema),
        ("pythonTests", {"memory": "64Mi"}, PythonTests),
    ],
)
def test_a_rule_is_the_block_that_is_set(name: str, written: dict[str, Any], kind: type) -> None:
    rule = RuleReward.model_validate({name: written})
    assert (rule.kind, type(rule.block), rule.block) == (name, kind, kind.model_validate(written))


def test_a_schema_is_read_as_json() -> None:
    assert JsonSchema.model_validate({"schema": '{"type": "object"}'}).parsed == {"type": "object"}


def test_ppo_needs_no_group() -> None:
    assert rl(algorithm="ppo", groupSize=1, globalBatchSize=8).answers_per_iteration == 8
