"""What a stage after pretraining may start from, and architectures of models that were trained elsewhere."""

from typing import Any

import pytest

from builders import manifest
from headrace_api.artifact import stage_hash
from headrace_api.errors import Body, ManifestError, parse_run
from headrace_api.model import PRESETS, Architecture, Family, RopeKind, RopeScaling
from headrace_api.parallelism import Layout
from headrace_api.planning.fit import device_errors, least_estimate, vocab_size
from headrace_api.planning.memory import num_stage_parameters
from headrace_api.references import architecture_of
from headrace_api.stages import Pretrain, Sft

DATA = {"sources": [{"uri": "/records"}]}


def run_with(origin: dict[str, Any], *, kind: str = "sft", **fields: Any) -> dict[str, Any]:
    """A good run with a stage that starts from ``origin``, and one that measures what it gives."""
    value = manifest("corpus", "tok", "tokens", "base")
    value["spec"]["stages"].append({"name": "tuned", kind: {"data": DATA, **origin, **fields}})
    if kind != "reward":
        value["spec"]["stages"].append({"name": "eval", "evaluate": {"from": {"model": "tuned", "shards": "tokens"}}})
    return value


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_stage_starts_from_an_earlier_one_or_from_a_folder_and_not_from_both(kind: str) -> None:
    earlier, folder = {"from": {"model": "base"}}, {"base": {"uri": "s3://models/llama"}}
    for origin in (earlier, folder):
        parse_run(run_with(origin, kind=kind), body=Body.CLUSTER)
    for origin in (earlier | folder, {}):
        with pytest.raises(ManifestError, match=rf"stages\[4\]\.{kind}\.from: .*set either from\.model.*or base\.uri"):
            parse_run(run_with(origin, kind=kind))


def test_every_stage_that_would_do_is_named_where_another_is_read() -> None:
    value = run_with({"from": {"model": "base"}})
    value["spec"]["stages"][5]["evaluate"]["from"]["model"] = "tok"
    with pytest.raises(
        ManifestError, match=r"stages\[5\]\.evaluate\.from\.model: 'tok': .* not a checkpoint; use base or tuned$"
    ):
        parse_run(value)


def test_a_folder_is_found_among_a_stages_addresses() -> None:
    run = parse_run(run_with({"base": {"uri": "models/llama"}}))
    assert (("base", "uri"), "models/llama") in list(run.spec.stages[4].config.addresses())
    with pytest.raises(ManifestError, match=r"sft\.base\.uri: 'models/llama': is relative"):
        parse_run(run_with({"base": {"uri": "models/llama"}}), body=Body.CLUSTER)


def test_a_model_that_was_trained_elsewhere_has_dimensions_that_only_the_trainer_knows() -> None:
    """So a layout that its own model may refuse is not refused here."""
    fields = {"parallelism": {"tensor": 8}, "globalBatchSize": 8}
    value = run_with({"base": {"uri": "/llama"}}, **fields)
    value["spec"]["stages"][4]["compute"] = value["spec"]["stages"][5]["compute"] = {"ranksPerNode": 8}
    stages = {stage.name: stage for stage in parse_run(value).spec.stages}
    assert architecture_of("tuned", stages) is None
    value["spec"]["stages"][4]["sft"] |= {"from": {"model": "base"}}
    del value["spec"]["stages"][4]["sft"]["base"]
    said = r"stages\[4\]\.sft\.parallelism\.tensor: 8: must divide the model's 4 heads; use 1, 2 or 4"
    with pytest.raises(ManifestError, match=said):
        parse_run(value)


def test_memory_is_not_estimated_for_a_model_of_unknown_dimensions() -> None:
    run = parse_run(run_with({"base": {"uri": "/llama"}}))
    base, tuned = run.spec.stages[3:5]
    assert least_estimate(run, base, on_gpus=True) is not None
    assert least_estimate(run, tuned, on_gpus=True) is None
    assert tuned.training is not None and vocab_size(run, tuned.training) is None
    device_errors(run, gpu_memory=1)


def test_the_identity_of_finished_work_is_what_it_was_before_there_were_families() -> None:
    pretrain = Pretrain.model_validate(
        {"from": {"shards": "tokens"}, "model": {"preset": "llama-nano"}, "tokens": "1M"}
    )
    sft = Sft.model_validate({"from": {"model": "base"}, "data": {"sources": [{"uri": "/x"}]}})
    assert stage_hash(pretrain, seed=1, inputs={"shards": "a" * 64}).startswith("f1370f896d497ddd")
    assert stage_hash(sft, seed=1, inputs={"model": "a" * 64}).startswith("f22271f96ee17be4")
    assert "family" not in PRESETS["llama-nano"].dump()


def test_what_a_family_adds_is_written_and_read_back() -> None:
    scaling = RopeScaling(kind=RopeKind.LLAMA3, factor=8)
    arch = PRESETS["llama-nano"].model_copy(update={"family": Family.GEMMA, "head_width": 64, "rope_scaling": scaling})
    assert Architecture.model_validate(arch.dump()) == arch
    assert Architecture.model_validate_json(arch.model_dump_json(by_alias=True)) == arch


PUBLISHED: list[tuple[str, dict[str, Any], int, int]] = [
    ("Llama 3.2 1B", {"layers": 16, "hidden_size": 2048, "heads": 32, "kv_heads": 8, "ffn_hidden_size": 8192, "tie_embeddings": True}, 128_256, 1_235_814_400),
    ("Mistral 7B", {"family": "mistral", "layers": 32, "hidden_size": 4096, "heads": 32, "kv_heads": 8, "ffn_hidden_size": 14336}, 32_000, 7_241_732_096),
    ("Qwen2.5 0.5B", {"family": "qwen2", "layers": 24, "hidden_size": 896, "heads": 14, "kv_heads": 2, "ffn_hidden_size": 4864, "tie_embeddings": True}, 151_936, 494_032_768),
    ("Qwen3 0.6B", {"family": "qwen3", "layers": 28, "hidden_size": 1024, "heads": 16, "kv_heads": 8, "ffn_hidden_size": 3072, "head_width": 128, "tie_embeddings": True}, 151_936, 596_049_920),
    ("Gemma 2B", {"family": "gemma", "layers": 18, "hidden_size": 2048, "heads": 8, "kv_heads": 1, "ffn_hidden_size": 16384, "head_width": 256, "tie_embeddings": True}, 256_000, 2_506_172_416),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "vocab", "published"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_parameters_are_as_published(name: str, fields: dict[str, Any], vocab: int, published: int) -> None:
    arch = Architecture(**fields)
    assert arch.num_parameters(vocab) == published


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_layout_of_one_rank_has_every_parameter(family: str) -> None:
    arch = PRESETS["llama-nano"].model_copy(update={"family": Family(family), "head_width": 48})
    arch = Architecture.model_validate(arch.dump())
    alone = Layout(tensor=1, pipeline=1, data=1)
    assert num_stage_parameters(arch, alone, stage=0, vocab_size=1024) == arch.num_parameters(1024)
