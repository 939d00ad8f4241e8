"""What a constitutional stage may say, what it means, and who may read what it leaves."""

from typing import Any

import pytest
from pydantic import ValidationError

from builders import manifest
from headrace_api.artifact import resume_identity, stage_hash
from headrace_api.errors import Body, ManifestError, parse_run
from headrace_api.stages import ArtifactKind, Constitutional, OfflineFinetune
from headrace_api.stages.constitutional import ConstitutionFile

PRINCIPLE: dict[str, Any] = {
    "name": "kind",
    "critiqueRequest": "Is it unkind?",
    "revisionRequest": "Make it kind.",
    "comparisonQuestion": "Which is kinder?",
}
DATA = {"sources": [{"uri": "/prompts.jsonl"}]}
ENDPOINT = {"url": "https://host/v1", "model": "judge"}


def block(**fields: Any) -> dict[str, Any]:
    constitution = {"version": "1", "principles": [PRINCIPLE]}
    return {"from": {"model": "base"}, "data": DATA, "constitution": constitution} | fields


def cai(**fields: Any) -> Constitutional:
    return Constitutional.model_validate(block(**fields))


def principles(**fields: Any) -> dict[str, Any]:
    return {"version": "1", "principles": [PRINCIPLE | fields]}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"constitution": {}}, "uri: None: set either uri"),
        (
            {"constitution": {"uri": "/c.yaml", "principles": [PRINCIPLE], "version": "1"}},
            "uri: '/c.yaml': set either uri",
        ),
        ({"constitution": {"principles": [PRINCIPLE]}}, "version: None: is needed beside principles"),
        (
            {"constitution": {"version": "1", "principles": [PRINCIPLE] * 2}},
            "principles: 'kind': is used twice; names must be unique in a constitution",
        ),
        ({"constitution": {"version": "1", "principles": [PRINCIPLE] * 33}}, "at most 32"),
        ({"constitution": principles(rule={})}, "Value error, : 'none': set either forbids or requires"),
        (
            {"constitution": principles(rule={"forbids": {"exactMatch": {}}, "requires": {"exactMatch": {}}})},
            "Value error, : 'both': set either forbids or requires",
        ),
        ({"constitution": principles(rule={"forbids": {"regex": {"pattern": "("}}})}, "is not a regular expression"),
        ({"constitution": principles(critiqueRequest="")}, "critiqueRequest"),
        ({"constitution": principles(name="Two Words")}, "write lower-case letters"),
        ({"maxNewTokens": 1024}, "maxNewTokens: 1024: must be below sequenceLength"),
        ({"critic": {"maxNewTokens": 1024}}, "critic.maxNewTokens: 1024: must be below sequenceLength"),
        (
            {"from": {"model": "base", "critic": "other"}, "critic": {"endpoint": ENDPOINT}},
            "critic.endpoint: 'other': set either from.critic",
        ),
        ({"critic": {"endpoint": ENDPOINT | {"url": "host/v1"}}}, "write the address below which"),
        ({"critic": {"endpoint": ENDPOINT | {"url": "https://me:secret@host/v1"}}}, "without a user, a password"),
        ({"critic": {"endpoint": ENDPOINT | {"url": "https://host/v1?key=secret"}}}, "without a user, a password"),
        ({"critic": {"endpoint": ENDPOINT | {"tokenVariable": "sk-1234"}}}, "not the token"),
        ({"critic": {"endpoint": ENDPOINT | {"timeout": "0s"}}}, "must be above 0"),
        ({"preferences": {"clamp": 0.4}}, "clamp"),
        ({"from": {}}, "set either from.model"),
        ({"epochs": 2}, "epochs"),
        ({"data": {"sources": []}}, "sources"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        cai(**fields)
    assert said in str(refused.value)


def test_answers_and_critiques_may_leave_room_for_one_token_of_a_prompt() -> None:
    config = cai(maxNewTokens=1023, critic={"maxNewTokens": 1023})
    assert (config.max_new_tokens, config.critic.max_new_tokens) == (1023, 1023)


def test_a_critic_is_another_stage_a_server_or_the_model_itself() -> None:
    other = cai(**{"from": {"model": "base", "critic": "other"}})
    assert (other.model_stage, other.critic_stage, other.inputs()) == (
        "base",
        "other",
        {"model": "base", "critic": "other"},
    )
    served = cai(critic={"endpoint": ENDPOINT})
    assert served.critic_stage is None and served.critic.endpoint is not None
    assert served.critic.endpoint.url == "https://host/v1"
    elsewhere = cai(base={"uri": "/llama"}, **{"from": {"critic": "other"}})
    assert (elsewhere.model_stage, elsewhere.inputs()) == (None, {"critic": "other"})
    alone = Constitutional.model_validate({k: v for k, v in block(base={"uri": "/llama"}).items() if k != "from"})
    assert (alone.model_stage, alone.critic_stage, alone.inputs()) == (None, None, {})


@pytest.mark.parametrize("side", ["forbids", "requires"])
def test_a_principles_rule_is_that_of_the_side_that_is_set(side: str) -> None:
    rule = cai(constitution=principles(rule={side: {"regex": {"pattern": "a"}}})).constitution.principles[0].rule
    assert rule is not None and rule.rule.kind == "regex"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"version": "1", "principles": []}, "principles"),
        ({"version": "", "principles": [PRINCIPLE]}, "version"),
        ({"principles": [PRINCIPLE]}, "version"),
        ({"version": "1", "principles": [PRINCIPLE, PRINCIPLE | {"name": "calm"}, PRINCIPLE]}, "principles: 'kind': is used"),
    ],
)  # fmt: skip
def test_a_file_of_principles_is_held_to_the_same(written: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ConstitutionFile.model_validate(written)
    assert said in str(refused.value)
    names = ["kind", "calm"]
    read = ConstitutionFile.model_validate({"version": "1", "principles": [PRINCIPLE | {"name": n} for n in names]})
    assert [principle.name for principle in read.principles] == names


def test_defaults_are_those_of_the_paper() -> None:
    config = cai()
    assert (config.write, config.passes, config.temperature, config.preferences.clamp) == ("revisions", 1, 1.0, 0.6)
    assert config.preferences.judgement == "chainOfThought"
    assert config.critic_stage is None and config.critic.endpoint is None
    assert config.GIVES is ArtifactKind.RECORDS


def test_what_does_not_change_the_records_does_not_change_their_identity() -> None:
    def hash_of(**fields: Any) -> str:
        return stage_hash(cai(**fields), seed=1, inputs={"model": "a" * 64})

    assert hash_of(promptsAtOnce=3, maxFailedShare=1, parallelism={"tensor": 2}) == hash_of()
    slow = ENDPOINT | {"timeout": "5m", "retries": 9, "atOnce": 1, "tokenVariable": "TOKEN"}
    assert hash_of(critic={"endpoint": slow}) == hash_of(critic={"endpoint": ENDPOINT})
    assert hash_of(critic={"endpoint": ENDPOINT | {"model": "other"}}) != hash_of(critic={"endpoint": ENDPOINT})
    assert hash_of(constitution=principles(revisionRequest="Be kinder.")) != hash_of()


def run_with(*more: dict[str, Any], **fields: Any) -> dict[str, Any]:
    value = manifest("corpus", "tok", "tokens", "base")
    value["spec"]["stages"] += [{"name": "cai", "constitutional": block(**fields)}, *more]
    return value


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_records_are_read_by_the_stages_that_train_on_records(kind: str) -> None:
    reading = {"name": "tuned", kind: {"from": {"model": "base", "records": "cai"}}}
    run = parse_run(run_with(reading), body=Body.CLUSTER)
    config = run.spec.stages[-1].config
    assert config.inputs() == {"model": "base", "records": "cai"}
    assert isinstance(config, OfflineFinetune) and config.records_stage == "cai"
    identities = [
        resume_identity(config, seed=1, inputs={"model": "a" * 64, "records": digest * 64}) for digest in ("b", "c")
    ]
    assert identities[0] != identities[1], "their digest is part of what a checkpoint belongs to"


@pytest.mark.parametrize(
    ("reading", "said"),
    [
        ({"sft": {"from": {"model": "base", "records": "base"}}}, r"from\.records: 'base': is a pretrain stage.*use cai"),
        ({"sft": {"from": {"model": "cai"}, "data": DATA}}, r"from\.model: 'cai': is a constitutional stage"),
        ({"sft": {"from": {"model": "base"}}}, r"data\.sources: lists none, and from\.records is not set"),
        ({"dpo": {"from": {"model": "base"}, "data": DATA | {"recordsWeight": 2}}}, r"data\.recordsWeight: 2\.0: is of from\.records; leave it out"),
        ({"sft": {"base": {"uri": "/llama"}}}, r"data\.sources: lists none, and from\.records is not set"),
        ({"rl": {"from": {"model": "base", "records": "cai"}, "data": DATA, "rewards": []}}, "records: unknown field"),
    ],
)  # fmt: skip
def test_references_to_records_are_checked(reading: dict[str, Any], said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        parse_run(run_with({"name": "tuned", **reading}))


def test_layouts_addresses_and_critics_are_checked_as_those_of_stages_that_train() -> None:
    parse_run(run_with(**{"from": {"model": "base", "critic": "base"}}), body=Body.CLUSTER)
    with pytest.raises(ManifestError, match=r"constitutional\.parallelism\.tensor: 8: must divide the model's"):
        value = run_with(parallelism={"tensor": 8})
        value["spec"]["stages"][-1]["compute"] = {"ranksPerNode": 8}
        parse_run(value)
    with pytest.raises(ManifestError, match=r"from\.critic: 'tok': is a tokenizer stage"):
        parse_run(run_with(**{"from": {"model": "base", "critic": "tok"}}))
    with pytest.raises(ManifestError, match=r"constitution\.uri: 'c\.yaml': is relative"):
        parse_run(run_with(constitution={"uri": "c.yaml"}), body=Body.CLUSTER)
