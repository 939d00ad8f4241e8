"""Bad manifests: each line names the field, the value and the remedy."""

from datetime import date
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError

from builders import STAGES, manifest
from headrace_api.base import Line, Part, Spec
from headrace_api.errors import Body, ManifestError, parse_run
from headrace_api.words import blocks_in, describe


def _nested(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


def _set(value: dict[str, Any], path: str, new: object) -> dict[str, Any]:
    """``value`` with one field changed; list items are named by the stage's name."""
    node: Any = value["spec"]
    *parents, last = path.split(".")
    for part in parents:
        node = next(s for s in node if s["name"] == part) if isinstance(node, list) else node.setdefault(part, {})
    if isinstance(node, list):
        node[next(i for i, s in enumerate(node) if s["name"] == last)] = new
    elif new is None:
        del node[last]
    else:
        node[last] = new
    return value


CASES = [
    ("sed", 1, "spec.sed: unknown field; did you mean seed?"),
    ("stages.base.pretrain.tokenz", "1M", "spec.stages[3].pretrain.tokenz: unknown field; did you mean tokens?"),
    ("stages.base.pretrain.schedule.rate", 1, "spec.stages[3].pretrain.schedule.rate: unknown field; known fields are"),
    (
        "stages.base.pretrain.parallelism.tensor", 3,
        "spec.stages[3].pretrain.parallelism.tensor: 3: must divide the model's 4 heads; use 1, 2 or 4",
    ),
    (
        "stages.base.pretrain.parallelism.tensor", 4,
        "spec.stages[3].pretrain.parallelism.tensor: 4: must divide the model's 2 kvHeads; use 1 or 2",
    ),
    (
        "stages.base.pretrain.parallelism.pipeline", 3,
        "spec.stages[3].pretrain.parallelism.pipeline: 3: must divide the model's 4 layers; use 1, 2 or 4",
    ),
    (
        "stages.base.compute", {"ranksPerNode": 3},
        "spec.stages[3].pretrain.parallelism: 'tensor 2 x pipeline 1': 2 ranks per replica must divide the gang's 3",
    ),
    (
        "stages.base.pretrain.microBatchSize", 5,
        "spec.stages[3].pretrain.globalBatchSize: 16: must be a multiple of microBatchSize x data ranks, 5 x 1 = 5",
    ),
    (
        "stages.base.pretrain.precision", "fp8",
        "spec.stages[3].pretrain.precision: 'fp8': needs GPUs with Transformer Engine; set compute.gpusPerNode, or use bf16",
    ),
    ("stages.base.pretrain.model", {"preset": "gpt"}, "spec.stages[3].pretrain.model.preset: 'gpt': choose one of llama-"),
    (
        "stages.base.pretrain.model", {"layers": 2},
        "spec.stages[3].pretrain.model.preset: set a preset, or set hiddenSize, heads, kvHeads, ffnHiddenSize too",
    ),
    ("stages.base.pretrain.schedule.warmup", 10**6, "spec.stages[3].pretrain.schedule.warmup: 1000000: must be below the"),
    (
        "stages.base.pretrain.schedule.minLearningRate", 1,
        "spec.stages[3].pretrain.schedule.minLearningRate: 1.0: must be at most learningRate, 0.0003",
    ),
    ("stages.base.pretrain.checkpoint.every", "soon", "spec.stages[3].pretrain.checkpoint.every: 'soon': not a duration"),
    (
        "stages.base.pretrain.from.shards", "tok",
        "spec.stages[3].pretrain.from.shards: 'tok': is a tokenizer stage, which produces a tokenizer, not a shards; use tokens",
    ),
    ("stages.base.pretrain.from.shards", "x", "spec.stages[3].pretrain.from.shards: 'x': no earlier stage has this name"),
    ("stages.base.pretrain", None, "spec.stages[3]: 'none': a stage has exactly one typed block of corpus, tokenizer"),
    ("stages.base.name", "tok", "spec.stages[3].name: 'tok': is used twice; names must be unique in a run"),
    ("stages.base.name", "Base", "spec.stages[3].name: 'Base': write lower-case letters, digits"),
    ("stages.eval.evaluate.require", {"acc": ">1"}, "spec.stages[4].evaluate.require: 'acc': is not measured; bound"),
    ("stages.eval.evaluate.require", {"exactMatch/x": ">1"}, "spec.stages[4].evaluate.require: 'exactMatch/x': is not measured; bound one of loss"),
    ("stages.eval.evaluate.exactMatch", [{"name": "a", "uri": "a.jsonl"}] * 2, "spec.stages[4].evaluate.exactMatch: 'a': is used twice; names must be unique in a stage"),
    ("stages.tok.tokenizer.vocabSize", "4X", "spec.stages[1].tokenizer.vocabSize: '4X': not a quantity; write a number with an optional suffix k, M, G, T, Ki, Mi or Gi, such as 140G"),
    ("stages.tok.tokenizer.import", {"uri": "x"}, "spec.stages[1].tokenizer.from: set either from.corpus"),
    ("stages.tok.compute", {"nodes": 2}, "spec.stages[1].compute.nodes: 2: tokenizer stages run on 1 node"),
    ("stages", [], "spec.stages: a list: list at least 1"),
    ("stages.eval.compute", {"ranksPerNode": 3}, "spec.stages[4].compute.ranksPerNode: 3: an evaluate stage splits the model over its ranks: must divide the model's 4 heads; use 1, 2 or 4"),
    ("stages.eval.compute", {"gpusPerNode": 4}, "spec.stages[4].compute.gpusPerNode: 4: an evaluate stage splits the model over its ranks: must divide the model's 2 kvHeads"),
    ("stages.eval.compute", {"ranksPerNode": 16}, "spec.stages[4].compute.ranksPerNode: 16: an evaluate stage splits the model over its ranks; use at most 8"),
    ("stages.eval.compute", {"nodes": 2}, "spec.stages[4].compute.nodes: 2: evaluate stages run on 1 node"),
    ("stages.ship.compute", {"gpusPerNode": 8}, "spec.stages[5].compute.gpusPerNode: 8: export stages run 1 process per node; leave it out"),
    ("stages.serve", {"name": "serve", "deploy": {"from": {"model": "ship"}, "engine": "vllm"}, "compute": {"gpusPerNode": 3}}, "spec.stages[6].compute.gpusPerNode: 3: vllm splits the heads over its GPUs: 4 heads and 2 kvHeads; use 1 or 2 or 4"),
    ("stages.base.compute", {"gpusPerNode": 2, "ranksPerNode": 4}, "spec.stages[3].compute.ranksPerNode: 4: must be at most gpusPerNode, 2: each rank needs its own GPU"),
    ("storage", {"uri": "gs://bucket/run"}, "spec.storage.uri: 'gs://bucket/run': only S3 and directories can be read: write s3://bucket/prefix, file:///folder or a path"),
    ("storage", {"uri": "s3://b\u00fccket/run"}, "spec.storage.uri: 's3://b\u00fccket/run': only S3"),
    ("storage", {"uri": "s3://"}, "spec.storage.uri: 's3://': only S3"),
    ("storage", {"uri": "file://relative"}, "spec.storage.uri: 'file://relative': only S3"),
    ("storage", {"uri": "a\tb"}, "spec.storage.uri: 'a\\tb': write one line, without tabs"),
    ("storage", {"uri": "s3://bucket/run", "endpoint": "host:9000"}, "spec.storage.endpoint: 'host:9000': write http://host:port or https://host"),
    ("stages.corpus.corpus.sources", [{"uri": "https://host/x"}], "spec.stages[0].corpus.sources[0].uri: 'https://host/x': only S3 and directories"),
    ("stages.corpus.corpus.quality", {"minWords": 9, "maxWords": 8}, "spec.stages[0].corpus.quality.minWords: 9: must be at most maxWords, 8"),
    ("stages.corpus.compute", {"cpu": 0}, "spec.stages[0].compute.cpu: 0: write a number of CPUs above 0"),
    ("stages.base.pretrain.tokens", "2.0000005M", "spec.stages[3].pretrain.tokens: '2.0000005M': not a whole number once its suffix is applied"),
    ("stages.base.pretrain.tokens", True, "spec.stages[3].pretrain.tokens: true: write a whole number"),
    ("stages.base.pretrain.checkpoint", {"every": "0"}, "spec.stages[3].pretrain.checkpoint.every: '0': write a number of steps from 1"),
    ("stages.base.pretrain.checkpoint", {"every": "0s"}, "spec.stages[3].pretrain.checkpoint.every: '0s': must be above 0; write a number of steps, such as 100, or a duration, such as 30m"),
    ("stages.base.pretrain.checkpoint", {"every": 10**9}, "spec.stages[3].pretrain.checkpoint.every: 1000000000: write a number of steps from 1 to 999999999"),
    ("stages.base.pretrain.optimizer", {"beta1": 1}, "spec.stages[3].pretrain.optimizer.beta1: 1: must be below 1"),
    ("stages.base.pretrain.precision", "fp16", "spec.stages[3].pretrain.precision: 'fp16': choose one of fp32, bf16, fp8"),
    ("stages.base.pretrain.global_batch_size", 4, "spec.stages[3].pretrain.global_batch_size: unknown field; did you mean globalBatchSize?"),
    ("seed", "1", "spec.seed: '1': write a whole number, without quotes"),
    ("seed", date(2024, 1, 1), "spec.seed: '2024-01-01': write a whole number"),
    ("seed", 2**128 - 1, "spec.seed: 340282366920938463463374607431768211455: must be at most 2147483647"),
    ("seed", 2**128, "spec.seed: a number of 129 bits: write a smaller one"),
    ("seed", -(2**128), "spec.seed: a number of 129 bits: write a smaller one"),
    ("seed", 2.0**62, "spec.seed: 4611686018427387904: must be at most"),
    ("seed", 2.0**63, "spec.seed: 9.223372036854776e+18: write a whole number"),
    ("seed", float("inf"), "spec.seed: inf: write a finite number"),
    ("seed", _nested(62), "spec.seed: a list: write a whole number"),
    ("seed", _nested(63), "spec.seed[0][0]: nested more than 64 deep: is a bracket left open?"),
    ("ttlSecondsAfterFinished", "60", "spec.ttlSecondsAfterFinished: '60': write a whole number, without quotes"),
    ("storage.uri", "x" * 1025, f"spec.storage.uri: '{'x' * 76}...: write at most 1024 characters"),
    ("storage.uri", "", "spec.storage.uri: '': write at least 1 character(s)"),
    ("storage", 1, "spec.storage: 1: write a block with uri, endpoint, region, secretRef"),
    ("storage.secretRef", {"name": ""}, "spec.storage.secretRef.name: '': write the object's name: lower-case letters"),
    ("stages", {}, "spec.stages: a block: write a list"),
    ("stages.base", 1, "spec.stages[3]: 1: write a block with name, compute, corpus, tokenizer, shards, pretrain"),
    ("stages.corpus.corpus.languages", ["en", None], "spec.stages[0].corpus.languages[1]: write text, in quotes"),
    ("stages.corpus.corpus.languages", ["english"], "spec.stages[0].corpus.languages[0]: 'english': write a two-letter ISO 639-1 code"),
    ("stages.corpus.corpus.languages", ["en"] * 101, "spec.stages[0].corpus.languages: a list: list at most 100; there are 101"),
    ("stages.corpus.corpus.sources", [], "spec.stages[0].corpus.sources: a list: list at least 1"),
    ("stages.corpus.corpus.sources", [{"uri": "/raw", "nope": None}], "spec.stages[0].corpus.sources[0].nope: unknown field"),
    ("stages.corpus.corpus.sources", [{}], "spec.stages[0].corpus.sources[0].uri: missing; this field is required"),
    ("stages.tok.tokenizer.vocabSize", 299, "spec.stages[1].tokenizer.vocabSize: 299: must be at least 300"),
    ("stages.tok.tokenizer.vocabSize", "1.5", "spec.stages[1].tokenizer.vocabSize: '1.5': not a whole number once its suffix"),
    ("stages.base.pretrain.keep", {"a": {"b": 1}}, "spec.stages[3].pretrain.keep: unknown field; known fields are sequenceLength,"),
    ("stages.base.pretrain.schedule.decay", "cosin", "spec.stages[3].pretrain.schedule.decay: 'cosin': did you mean cosine?"),
    ("stages.base.pretrain.schedule.decay", 1, "spec.stages[3].pretrain.schedule.decay: 1: choose one of cosine, constant"),
    ("stages.base.pretrain.schedule.learningRate", "3e-4", "spec.stages[3].pretrain.schedule.learningRate: '3e-4': write a number, without"),
    ("stages.base.pretrain.schedule.learningRate", 0, "spec.stages[3].pretrain.schedule.learningRate: 0: must be above 0.0"),
    ("stages.base.pretrain.parallelism.pipeline", 2, "spec.stages[3].pretrain.parallelism: 'tensor 2 x pipeline 2': 4 ranks per replica must divide the gang's 2"),
    (
        "stages.base.pretrain",
        {**STAGES["base"]["pretrain"], "model": {"preset": "llama-nano", "heads": 18, "kvHeads": 18, "hiddenSize": 180}, "parallelism": {"tensor": 4}},
        "spec.stages[3].pretrain.parallelism.tensor: 4: must divide the model's 18 heads; use 1, 2, 3 or 6",
    ),
    (
        "stages.base.pretrain",
        {**STAGES["base"]["pretrain"], "model": {"preset": "llama-nano", "layers": 1}, "parallelism": {"pipeline": 2}},
        "spec.stages[3].pretrain.parallelism.pipeline: 2: must divide the model's 1 layers; use 1",
    ),
    (
        "stages.base.pretrain.model", {"preset": "llama-nano", "ffnHiddenSize": 383},
        "spec.stages[3].pretrain.parallelism.tensor: 2: must divide ffnHiddenSize, 383",
    ),
    ("stages.base.pretrain.model", {"preset": "llama-nano", "heads": 3}, "spec.stages[3].pretrain.model.heads: 3: hiddenSize 128 must be an even multiple"),
    ("stages.base.pretrain.model", {"preset": "llama-nano", "kvHeads": 3}, "spec.stages[3].pretrain.model.kvHeads: 3: must divide heads, 4"),
    ("stages.eval.evaluate.require", {"l" * 65: ">1"}, f"spec.stages[4].evaluate.require.'{'l' * 59}: '{'l' * 65}': write at most 64 characters"),
    ("stages.eval.evaluate.require", {"loss": [1]}, "spec.stages[4].evaluate.require.loss: a list: write text, in quotes"),
    ("stages.eval.evaluate.require", {"loss": "3"}, "spec.stages[4].evaluate.require.loss: '3': write a comparison with a number"),
    ("stages.eval.evaluate.tasks", "perplexity", "spec.stages[4].evaluate.tasks: 'perplexity': write a list"),
    ("stages.serve.deploy.engine", "vlm", "spec.stages[6].deploy.engine: 'vlm': did you mean vllm?"),
    ("stages.corpus.compute", {"cpu": 1.5}, "spec.stages[0].compute.cpu: 1.5: write text, in quotes"),
    ("stages.corpus.compute", {"cpu": True}, "spec.stages[0].compute.cpu: true: write text, in quotes"),
    ("stages.corpus.compute", {"cpu": "4 cores"}, "spec.stages[0].compute.cpu: '4 cores': write a number of CPUs above 0"),
    ("stages.corpus.compute", {"ranksPerNode": 2}, "spec.stages[0].compute.ranksPerNode: 2: corpus stages run 1 process per node"),
    ("restartPolicy.onStall", "0s", "spec.restartPolicy.onStall: '0s': must be above 0"),
    ("restartPolicy.onStall", 60, "spec.restartPolicy.onStall: 60: must be above 0; write a number with a unit"),
    ("restartPolicy.onStall", "soon", "spec.restartPolicy.onStall: 'soon': not a duration"),
    ("restartPolicy", {"max_infra_restarts": 3}, "spec.restartPolicy.max_infra_restarts: unknown field; did you mean maxInfraRestarts?"),
    ("restartPolicy", [], "spec.restartPolicy: a list: write a block with maxInfraRestarts, maxUserRestarts"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "expected"), CASES, ids=[f"{p}={v}"[:60].replace("\\", "/") for p, v, _ in CASES]
)
def test_a_bad_field_is_named_with_its_value_and_the_remedy(path, value, expected):
    with pytest.raises(ManifestError) as caught:
        parse_run(_set(manifest(), path, value))
    assert any(p.startswith(expected) for p in caught.value.problems), caught.value.problems


def test_every_problem_is_told_at_once():
    bad = _set(_set(manifest(), "sed", 1), "stages.base.pretrain.schedule.warmup", "x")
    with pytest.raises(ManifestError) as caught:
        parse_run(bad)
    assert len(caught.value.problems) == 2
    assert str(caught.value).splitlines() == caught.value.problems


def test_names_that_are_too_long_for_a_pod_are_refused():
    bad = manifest()
    bad["metadata"]["name"] = "r" * 40
    bad["spec"]["stages"][0]["name"] = "s" * 20
    for stage in bad["spec"]["stages"][1:3]:
        next(iter(v for k, v in stage.items() if k != "name"))["from"]["corpus"] = "s" * 20
    with pytest.raises(ManifestError, match="too many for a pod's host name"):
        parse_run(bad)


OBJECTS = [
    ("metadata", {"name": "demo", "label": {}}, "metadata.label: unknown field; did you mean labels?"),
    ("metadata", {"name": "demo", "nope": None}, "metadata.nope: unknown field; known fields are name, namespace, uid"),
    ("metadata", {"name": "demo", "deletionTimestamp": "soon"}, "metadata.deletionTimestamp: 'soon': write a time, such as 2026"),
    ("metadata", [], "metadata: a list: write a block with name, namespace"),
    ("metadata", {}, "metadata.name: missing; this field is required"),
    ("apiVersion", None, "apiVersion: missing; this field is required"),
    ("kind", "trainingrun", "kind: 'trainingrun': did you mean TrainingRun?"),
    ("nope", 1, "nope: unknown field; known fields are apiVersion, kind, metadata, spec, status"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "expected"), OBJECTS, ids=[f"{f}={v}" for f, v, _ in OBJECTS])
def test_a_bad_field_beside_the_spec_is_named_too(field, value, expected):
    with pytest.raises(ManifestError) as caught:
        parse_run({**manifest(), field: value})
    (problem,) = caught.value.problems
    assert problem.startswith(expected)


def test_a_key_without_a_value_is_a_key_left_out():
    value = manifest(runtime=None, restartPolicy=None)
    value["metadata"] |= {"labels": None, "annotations": {}, "creationTimestamp": None}
    value["spec"]["stages"][3]["pretrain"]["schedule"] = None
    assert parse_run(value).spec == parse_run(manifest()).spec


def test_a_whole_number_may_be_written_with_a_point():
    assert parse_run(_set(manifest(), "seed", 16.0)).spec.seed == 16


@pytest.mark.parametrize(("written", "meant"), [(4, "4"), ("4", "4"), ("0.5", "0.5"), ("500m", "500m")])
def test_processors_may_be_written_as_a_number(written, meant):
    stage = parse_run(_set(manifest(), "stages.corpus.compute", {"cpu": written})).spec.stages[0]
    assert stage.compute.cpu == meant


@pytest.mark.parametrize(("written", "meant"), [(1, 1), ("1", 1), (999_999_999, 999_999_999), ("500ms", "500ms")])
def test_how_often_is_written_in_steps_or_in_time(written, meant):
    stage = parse_run(_set(manifest(), "stages.base.pretrain.checkpoint", {"every": written})).spec.stages[3]
    assert stage.pretrain.checkpoint.every == meant


class _Inner(Spec):
    name: Annotated[Line, Field(min_length=3)]
    nodes: Annotated[int, Part.EXECUTION] = 1


class _Outer(Spec):
    plain: int = 0
    texts: list[str] = Field(default_factory=list)
    one: _Inner
    maybe: _Inner | None = None
    many_of_them: list[_Inner] = Field(default_factory=list)


def test_the_blocks_in_a_block_are_found_through_lists_and_options():
    assert blocks_in(_Outer) == {"plain": None, "texts": None, "one": _Inner, "maybe": _Inner, "manyOfThem": _Inner}


def test_what_does_not_matter_to_a_result_is_left_out_at_every_depth():
    inner = {"name": "abc", "nodes": 2}
    outer = _Outer.model_validate({"one": inner, "maybe": inner, "manyOfThem": [inner], "texts": ["x"]})
    kept = {"name": "abc"}
    said = {"plain": 0, "texts": ["x"], "one": kept, "maybe": kept, "manyOfThem": [kept]}
    assert outer.dump_without([Part.EXECUTION]) == said


def test_a_text_that_is_too_short_is_no_list():
    with pytest.raises(ValidationError) as caught:
        _Inner.model_validate({"name": "ab"})
    assert [describe(e, _Inner) for e in caught.value.errors()] == ["name: 'ab': write at least 3 character(s)"]


def test_half_a_second_is_an_amount_of_time():
    assert parse_run(_set(manifest(), "restartPolicy.onStall", "500ms")).spec.restart_policy.on_stall == "500ms"


VLLM = [
    (1, {"heads": 3, "kvHeads": 3, "hiddenSize": 48}, ""),
    (2, {"heads": 3, "kvHeads": 3, "hiddenSize": 48}, "3 heads and 3 kvHeads; use 1 or 3"),
    (2, {"heads": 6, "kvHeads": 3, "hiddenSize": 96}, "6 heads and 3 kvHeads; use 1 or 3 or 6"),
    (3, {"heads": 6, "kvHeads": 3, "hiddenSize": 96}, ""),
    (4, {}, ""),
    (8, {}, "4 heads and 2 kvHeads; use 1 or 2 or 4"),
]


@pytest.mark.parametrize(("gpus", "model", "refusal"), VLLM)
def test_vllm_splits_heads_and_splits_or_repeats_those_of_keys(gpus, model, refusal):
    value = manifest()
    corpus, tok, tokens, base, _, ship, serve = value["spec"]["stages"]
    base["pretrain"] |= {"model": {"preset": "llama-nano", **model}, "parallelism": {}}
    base["compute"] = {}
    serve["deploy"]["engine"] = "vllm"
    serve["compute"] = {"gpusPerNode": gpus}
    value["spec"]["stages"] = [corpus, tok, tokens, base, ship, serve]
    if not refusal:
        assert parse_run(value).spec.stages[5].compute.gpus_per_node == gpus
        return
    with pytest.raises(ManifestError) as caught:
        parse_run(value)
    said = f"spec.stages[5].compute.gpusPerNode: {gpus}: vllm splits the heads over its GPUs: {refusal}"
    assert caught.value.problems == [said]


RELATIVE = [
    ("storage.uri", "runs", "spec.storage.uri: 'runs': is relative"),
    ("storage", {}, "spec.storage.uri: is unset: write s3://bucket/prefix, or a directory that every pod mounts"),
    ("stages.corpus.corpus.sources", [{"uri": "/raw"}, {"uri": "raw"}], "spec.stages[0].corpus.sources[1].uri: 'raw': is relative"),
    ("stages.tok.tokenizer", {"import": {"uri": "gpt2"}}, "spec.stages[1].tokenizer.import.uri: 'gpt2': is relative"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "expected"), RELATIVE, ids=[path for path, _, _ in RELATIVE])
def test_a_cluster_has_no_folder_that_a_path_could_be_relative_to(path, value, expected):
    changed = _set(manifest(), path, value)
    assert parse_run(changed), "on a laptop it is relative to the manifest"
    with pytest.raises(ManifestError) as caught:
        parse_run(changed, body=Body.CLUSTER)
    (problem,) = caught.value.problems
    assert problem.startswith(expected)


@pytest.mark.parametrize("uri", ["/store", "s3://bucket/runs", "file:///store"])
def test_a_cluster_takes_paths_that_mean_the_same_everywhere(uri):
    value = _set(manifest(), "storage.uri", uri)
    value = _set(value, "stages.corpus.corpus.sources", [{"uri": uri}])
    value = _set(value, "stages.tok.tokenizer", {"import": {"uri": uri}})
    assert parse_run(value, body=Body.CLUSTER).spec.storage.uri == uri
