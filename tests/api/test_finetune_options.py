"""What a loss of dpo, an early stop and the samples may say; the API server is told the same in tests/operator."""

from typing import Any

import pytest
from pydantic import ValidationError

from headrace_api.artifact import resume_identity, stage_hash
from headrace_api.stages import Dpo, Lora, LoraTarget, Reward, Rl, Sft
from headrace_api.stages.dpo import DpoLoss

BLOCK: dict[str, Any] = {"from": {"model": "base"}, "data": {"sources": [{"uri": "/records"}]}}
HELD_OUT: dict[str, Any] = {"data": BLOCK["data"] | {"validation": {"fraction": 0.1}}}


def dpo(**fields: Any) -> Dpo:
    return Dpo.model_validate(BLOCK | fields)


@pytest.mark.parametrize(
    ("fields", "strength"),
    [
        ({}, 0.1),
        ({"loss": "orpo"}, 0.1),
        ({"loss": "kto", "desirableWeight": 2, "undesirableWeight": 0.5}, 0.1),
        ({"loss": "simpo"}, 2.0),
        ({"loss": "simpo", "gamma": 0, "beta": 2.5}, 2.5),
        ({"loss": "hinge", "lengthNormalized": True, "beta": 0.5}, 0.5),
        ({"loss": "cdpo", "labelSmoothing": 0.1}, 0.1),
        ({"loss": "robust", "labelSmoothing": 0.49, "lengthNormalized": True}, 0.1),
        ({"loss": "kto", "globalBatchSize": 2}, 0.1),
        ({"loss": "sigmoid", "globalBatchSize": 1}, 0.1),
    ],
)
def test_a_loss_has_its_options_and_a_usual_strength(fields: dict[str, Any], strength: float) -> None:
    assert dpo(**fields).strength == strength


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"gamma": 0.5}, "gamma: 0.5: is of the loss simpo"),
        ({"loss": "orpo", "gamma": 0}, "gamma: 0.0: is of the loss simpo"),
        ({"loss": "simpo", "desirableWeight": 1}, "desirableWeight: 1.0: is of the loss kto"),
        ({"undesirableWeight": 2}, "undesirableWeight: 2.0: is of the loss kto"),
        ({"loss": "kto", "globalBatchSize": 1}, "globalBatchSize: 1: kto takes its reference point"),
        ({"loss": "kto", "lengthNormalized": True}, "lengthNormalized: True: is of sigmoid"),
        ({"loss": "orpo", "labelSmoothing": 0.1}, "labelSmoothing: 0.1: is of the losses cdpo and robust"),
        ({"labelSmoothing": 0.1}, "labelSmoothing: 0.1: is of the losses cdpo and robust"),
        ({"loss": "orpo", "lengthNormalized": True}, "lengthNormalized: True: is of sigmoid"),
        ({"loss": "simpo", "lengthNormalized": True}, "lengthNormalized: True: is of sigmoid"),
        ({"loss": "kto", "desirableWeight": 0}, "desirableWeight"),
        ({"loss": "apo"}, "loss"),
    ],
)
def test_an_option_of_another_loss_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        dpo(**fields)
    assert said in str(caught.value)


def test_only_two_losses_need_no_reference_model() -> None:
    assert {loss for loss in DpoLoss if not loss.needs_reference} == {"orpo", "simpo"}


@pytest.mark.parametrize("kind", [Sft, Reward, Dpo])
def test_what_is_held_against_a_held_out_loss_needs_one(kind: Any) -> None:
    for fields in ({"earlyStop": {}}, {"keep": "best"}):
        with pytest.raises(ValidationError, match=r"data\.validation: None: earlyStop and keep: best need held-out"):
            kind.model_validate(BLOCK | fields)
        assert kind.model_validate(BLOCK | HELD_OUT | fields).keeps_best
    kind.model_validate(BLOCK | {"keep": "last"})


@pytest.mark.parametrize(
    ("fields", "keeps_best"),
    [
        ({}, False),
        ({"keep": "last"}, False),
        ({"keep": "best"}, True),
        ({"earlyStop": {"patience": 1}}, True),
        ({"earlyStop": {"patience": 1}, "keep": "last"}, False),
    ],
)
def test_the_best_weights_are_kept_where_a_stage_may_stop_early(fields: dict[str, Any], keeps_best: bool) -> None:
    assert Sft.model_validate(BLOCK | HELD_OUT | fields).keeps_best is keeps_best


def test_an_adapter_has_each_matrix_once() -> None:
    twice = {"adapter": {"lora": {"targets": ["qkv", "fc1", "fc1"]}}}
    with pytest.raises(ValidationError, match="targets: 'fc1': names a matrix twice; name each once"):
        Sft.model_validate(BLOCK | twice)
    assert [*Lora().targets] == [*LoraTarget]


def test_records_may_come_from_an_earlier_stage_a_folder_or_both() -> None:
    earlier = {"from": {"model": "base", "records": "cai"}}
    assert Sft.model_validate(BLOCK).records_stage is None
    assert Sft.model_validate(BLOCK | earlier).records_stage == "cai"
    alone = Sft.model_validate(earlier | {"data": {"recordsWeight": 2}})
    assert (alone.records_stage, alone.data.sources, alone.data.records_weight) == ("cai", [], 2.0)
    elsewhere = {"base": {"uri": "/llama"}, "from": {"records": "cai"}}
    assert Sft.model_validate(elsewhere).inputs() == {"records": "cai"}
    assert Sft.model_validate({"base": {"uri": "/llama"}, "data": BLOCK["data"]}).records_stage is None


def test_more_patience_goes_on_and_more_samples_change_nothing() -> None:
    plain, stops, asks = (
        Sft.model_validate(BLOCK | HELD_OUT | fields)
        for fields in ({}, {"earlyStop": {"patience": 2}}, {"samples": {"count": 64}})
    )

    def of(function: Any, config: Sft) -> Any:
        return function(config, seed=1, inputs={"model": "d" * 64})

    assert of(resume_identity, stops) == of(resume_identity, plain)
    assert of(stage_hash, stops) != of(stage_hash, plain)
    assert of(stage_hash, asks) == of(stage_hash, plain)


def test_a_model_that_scores_answers_nothing() -> None:
    assert {kind for kind in (Sft, Reward, Dpo, Rl) if "samples" in kind.model_fields} == {Sft, Dpo, Rl}
