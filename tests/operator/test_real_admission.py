"""What the API server rejects by the generated CRDs: each rule alone, and overall the same as the operator.

Objects are created with ``dryRun=All`` and strict field validation, as kubectl does; nothing is stored.
"""

import copy
import http.client
import json
import random
import ssl
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from builders import manifest
from headrace_api import crd
from headrace_api.errors import Body, ManifestError, parse_run
from headrace_api.runtime import TrainingRuntime
from headrace_api.stages import KINDS, StartsFromModel
from manifests import PLAIN_SCALARS, Manifests, runtime_schema, seed_of_this_test

pytestmark = pytest.mark.slow

Json = dict[str, Any]

RUNTIME: Json = {
    "apiVersion": "headrace.dev/v1alpha1",
    "kind": "TrainingRuntime",
    "metadata": {"name": "gpus"},
    "spec": {
        "trainer": {"image": "trainer:1", "gpuMemory": "80Gi", "podTemplate": {"spec": {"nodeSelector": {"a": "b"}}}}
    },
}

COUNT = 2_500
NOTHING: Any = object()

_SHARED = (
    "the ranks that share the model of an evaluate, sft or reward or rl or dpo or constitutional stage must divide its"
)
_RECORDS: Json = {"sources": [{"uri": "/records"}]}
_TUNED: Json = {"from": {"model": "base"}, "data": _RECORDS}
_RULE: Json = {"rule": {"numeric": {}}}
_PRINCIPLE: Json = {
    "name": "kind",
    "critiqueRequest": "Is it unkind?",
    "revisionRequest": "Make it kind.",
    "comparisonQuestion": "Which is kinder?",
}
_CONSTITUTION: Json = {"version": "1", "principles": [_PRINCIPLE]}
TUNED = [kind for kind, config in KINDS.items() if issubclass(config, StartsFromModel)]
_NEEDED: dict[str, Json] = {"rl": {"rewards": [_RULE]}, "constitutional": {"constitution": _CONSTITUTION}}
"""What a kind needs besides a model and records."""


def _tuned(kind: str, compute: Json | None = None, **fields: Json) -> Json:
    return {"stages.tuned": {"compute": compute or {}, kind: {**_TUNED, **_NEEDED.get(kind, {}), **fields}}}


def _starting(kind: str) -> dict[tuple[str, str], Json]:
    """The cases of a stage that starts from a model and reads records."""

    def tuned(compute: Json | None = None, **fields: Json) -> Json:
        return _tuned(kind, compute, **fields)

    def data(**fields: Json) -> Json:
        return tuned(data={**_RECORDS, **fields})

    def based(uri: str) -> Json:
        return {"stages.tuned": {kind: {"base": {"uri": uri}, "data": _RECORDS, **_NEEDED.get(kind, {})}}}

    place = f"spec.stages[].{kind}"
    return {
        (place, "set either from.model"): tuned(base={"uri": "/models/llama"}),
        ("spec", f"{kind}.base.uri is relative"): based("models/llama"),
        (f"{place}.base.uri", "only S3"): based("gs://models/llama"),
        ("spec", f"{kind}.data.sources.uri is relative"): data(sources=[{"uri": "records.jsonl"}]),
        ("spec", f"{kind}.from.model must name"): tuned(**{"from": {"model": "tokens"}}),
        ("spec.stages[]", f"{kind}.parallelism.tensor x"): tuned({"ranksPerNode": 3}, parallelism={"tensor": 2}),
        ("spec.stages[]", f"{kind}.precision fp8"): tuned(precision="fp8"),
        (f"{place}.data.sources[].uri", "only S3"): data(sources=[{"uri": "gs://bucket/records"}]),
    }


def _fine_tuning(kind: str) -> dict[tuple[str, str], Json]:
    """The cases of a stage that trains a model further."""

    def tuned(**fields: Json) -> Json:
        return _tuned(kind, **fields)

    place = f"spec.stages[].{kind}"
    return _starting(kind) | {
        ("spec.stages[]", f"{kind}.globalBatchSize must"): tuned(microBatchSize=3),
        (f"{place}.schedule", "minLearningRate must"): tuned(schedule={"minLearningRate": 1}),
        (f"{place}.checkpoint.every", "must be above 0"): tuned(checkpoint={"every": "0s"}),
        (f"{place}.adapter.lora.targets", "names a matrix twice"): tuned(adapter={"lora": {"targets": ["qkv", "qkv"]}}),
    }


def _offline(kind: str) -> dict[tuple[str, str], Json]:
    """The cases of one that trains on what its records hold."""

    def held_out(**validation: Json) -> Json:
        return {"stages.tuned": {kind: {**_TUNED, "data": {**_RECORDS, "validation": validation}}}}

    place = f"spec.stages[].{kind}.data.validation"
    stops: Json = {"stages.tuned": {kind: {**_TUNED, "earlyStop": {"patience": 2}}}}
    return _fine_tuning(kind) | {
        (f"spec.stages[].{kind}", "earlyStop and keep: best need"): stops,
        ("spec", f"{kind}.data.validation.uri is relative"): held_out(uri="records.jsonl"),
        (place, "set either uri"): held_out(uri="/records", fraction=0.1),
        (place, "format is of"): held_out(fraction=0.1, format="jsonl"),
        (f"{place}.uri", "only S3"): held_out(uri="gs://bucket/records"),
        ("spec", f"{kind}.from.records must name"): _tuned(kind, **{"from": {"model": "base", "records": "base"}}),
        (f"spec.stages[].{kind}", "data.sources lists none"): _tuned(kind, data={}),
        (f"spec.stages[].{kind}", "data.recordsWeight is of"): _tuned(kind, data={**_RECORDS, "recordsWeight": 2}),
    }


def _rl() -> dict[tuple[str, str], Json]:
    """The cases of reinforcement learning."""

    def rl(**fields: Json) -> Json:
        return {"stages.tuned": {"rl": {**_TUNED, "rewards": [_RULE], **fields}}}

    def tests(memory: str) -> Json:
        return rl(rewards=[{"rule": {"pythonTests": {"memory": memory}}}])

    judged: Json = {"from": {"model": "base", "reward": "base"}, "rewards": [{"model": {}}]}
    place = "spec.stages[].rl"
    return _fine_tuning("rl") | {
        ("spec", "rl.from.reward must name"): rl(**judged),
        (place, "globalBatchSize must divide"): rl(globalBatchSize=48),
        (place, "groupSize: grpo and rloo"): rl(groupSize=1, promptsPerIteration=64),
        (place, "maxNewTokens must be below"): rl(maxNewTokens=1024),
        (place, "rewards has a model only with"): rl(rewards=[{"model": {}}]),
        (place, "loss is of grpo"): rl(algorithm="rloo", loss="gspo"),
        (f"{place}.rewards[]", "set either rule or model"): rl(rewards=[{"weight": 2}]),
        (f"{place}.rewards[].rule", "set exactly one of"): rl(rewards=[{"rule": {"numeric": {}, "exactMatch": {}}}]),
        (f"{place}.rewards[].rule.pythonTests.memory", "must be at least"): tests("1Mi"),
        (f"{place}.rewards[].rule.pythonTests.memory", "must be at most"): tests("2Ti"),
        (f"{place}.kl", "target adapts a coefficient"): rl(kl={"target": 6}),
    }


def _constitutional() -> dict[tuple[str, str], Json]:
    """The cases of Constitutional AI."""

    def cai(**fields: Json) -> Json:
        return _tuned("constitutional", **fields)

    def constitution(**fields: Json) -> Json:
        return cai(constitution={**_CONSTITUTION, **fields})

    def by_rule(**rule: Json) -> Json:
        return constitution(principles=[{**_PRINCIPLE, "rule": rule}])

    critic: Json = {"endpoint": {"url": "https://host/v1", "model": "judge"}}
    place = "spec.stages[].constitutional"
    rule = f"{place}.constitution.principles[].rule"
    both: Json = {"numeric": {}, "exactMatch": {}}

    def sides(side: str) -> dict[tuple[str, str], Json]:
        tests, memory = {"pythonTests": {"memory": "1Mi"}}, {"pythonTests": {"memory": "2Ti"}}
        return {
            (f"{rule}.{side}", "set exactly one of"): by_rule(**{side: both}),
            (f"{rule}.{side}.pythonTests.memory", "must be at least"): by_rule(**{side: tests}),
            (f"{rule}.{side}.pythonTests.memory", "must be at most"): by_rule(**{side: memory}),
        }

    return _starting("constitutional") | {
        ("spec", "constitutional.constitution.uri is relative"): cai(constitution={"uri": "principles.yaml"}),
        ("spec", "constitutional.from.critic must name"): cai(**{"from": {"model": "base", "critic": "tokens"}}),
        (place, "maxNewTokens must be below"): cai(maxNewTokens=1024),
        (place, "critic.maxNewTokens must be below"): cai(critic={"maxNewTokens": 1024}),
        (place, "critic.endpoint: set either"): cai(critic=critic, **{"from": {"model": "base", "critic": "base"}}),
        (f"{place}.critic.endpoint.timeout", "must be above 0"): cai(
            critic={"endpoint": {**critic["endpoint"], "timeout": "0s"}}
        ),
        (f"{place}.constitution", "set either uri"): constitution(uri="/principles.yaml"),
        (f"{place}.constitution", "version is needed"): cai(constitution={"principles": [_PRINCIPLE]}),
        (f"{place}.constitution.uri", "only S3"): cai(constitution={"uri": "gs://bucket/principles.yaml"}),
        (rule, "set either forbids or requires"): by_rule(),
        **sides("forbids"),
        **sides("requires"),
    }


CASES: dict[tuple[str, str], Json] = {
    ("", "the run's name and a stage's name"): {"metadata.name": "r" * 40, "stages.serve.name": "s" * 9},
    ("", "metadata.name has two hyphens in a row"): {"metadata.name": "two--hyphens"},
    ("spec", "storage.uri is unset"): {"storage": {}},
    ("spec", "storage.uri is relative"): {"storage.uri": "runs/one"},
    ("spec", "corpus.sources.uri is relative"): {"stages.corpus.corpus.sources": [{"uri": "/raw"}, {"uri": "text"}]},
    ("spec", "tokenizer.import.uri is relative"): {"stages.tok.tokenizer": {"import": {"uri": "gpt2"}}},
    ("spec", "tokenizer.from.corpus must"): {"stages.tok.tokenizer.from.corpus": "tok"},
    ("spec", "shards.from.corpus must"): {"stages.tokens.shards.from.corpus": "tok"},
    ("spec", "shards.from.tokenizer must"): {"stages.tokens.shards.from.tokenizer": "nobody"},
    ("spec", "pretrain.from.shards must"): {"stages.base.pretrain.from.shards": "corpus"},
    ("spec", "evaluate.from.model must"): {"stages.eval.evaluate.from.model": "ship"},
    ("spec", "evaluate.from.shards must"): {"stages.eval.evaluate.from.shards": "base"},
    ("spec", "export.from.model must"): {"stages.ship.export.from.model": "tokens"},
    ("spec", "deploy.from.model must"): {"stages.serve.deploy.from.model": "base"},
    ("spec", "compute.ranksPerNode of an evaluate stage must be at most 8"): {
        "stages.base.pretrain.model": {"preset": "llama-nano", "hiddenSize": 160, "heads": 16, "kvHeads": 16},
        "stages.eval.compute": {"ranksPerNode": 16},
    },
    ("spec", f"{_SHARED} kvHeads"): {"stages.eval.compute": {"ranksPerNode": 4}},
    ("spec", f"{_SHARED} layers"): {
        "stages.tuned": {"compute": {"ranksPerNode": 3}, "sft": {**_TUNED, "parallelism": {"pipeline": 3}, "globalBatchSize": 3}},
    },
    ("spec", f"{_SHARED} ffnHiddenSize"): {
        "stages.base.pretrain.model": {"preset": "llama-nano", "ffnHiddenSize": 383},
        "stages.base.compute": {},
        "stages.base.pretrain.parallelism": {},
        "stages.eval.compute": {"ranksPerNode": 2},
    },
    ("spec", "vllm splits the heads over its GPUs"): {
        "stages.serve.deploy.engine": "vllm",
        "stages.serve.compute": {"gpusPerNode": 8},
    },
    ("spec.restartPolicy.onStall", "must be above 0"): {"restartPolicy": {"onStall": "0s"}},
    ("spec.storage.uri", "only S3"): {"storage.uri": "gs://bucket/runs"},
    ("spec.stages[]", "a stage has exactly one typed block"): {"stages.serve.deploy": NOTHING},
    ("spec.stages[]", "compute.nodes must be 1"): {"stages.tok.compute": {"nodes": 2}},
    ("spec.stages[]", "compute.ranksPerNode must be 1"): {"stages.ship.compute": {"gpusPerNode": 2}},
    ("spec.stages[]", "pretrain.parallelism.tensor x pipeline must divide"): {"stages.base.compute": {"ranksPerNode": 3}},
    ("spec.stages[]", "pretrain.globalBatchSize must be a multiple"): {"stages.base.pretrain.microBatchSize": 5},
    ("spec.stages[]", "pretrain.precision fp8 needs GPUs"): {"stages.base.pretrain.precision": "fp8"},
    ("spec.stages[].compute", "ranksPerNode must be at most gpusPerNode"): {"stages.base.compute": {"gpusPerNode": 2, "ranksPerNode": 4}},
    ("spec.stages[].compute.cpu", "write a number of CPUs"): {"stages.tok.compute": {"cpu": "0.0"}},
    ("spec.stages[].compute.memory", "must be at least 1"): {"stages.tok.compute": {"memory": "0Gi"}},
    ("spec.stages[].compute.memory", "must be at most"): {"stages.tok.compute": {"memory": "1001T"}},
    ("spec.stages[].corpus.sources[].uri", "only S3"): {"stages.corpus.corpus.sources": [{"uri": "https://host/text"}]},
    ("spec.stages[].corpus.quality", "minWords must be"): {"stages.corpus.corpus.quality": {"minWords": 9, "maxWords": 8}},
    ("spec.stages[].corpus.quality", "minMeanWordLength must be"): {"stages.corpus.corpus.quality": {"minMeanWordLength": 10.5}},
    ("spec.stages[].tokenizer", "set either from.corpus"): {"stages.tok.tokenizer.import": {"uri": "/gpt2"}},
    ("spec.stages[].tokenizer.import.uri", "only S3"): {"stages.tok.tokenizer": {"import": {"uri": "s3://"}}},
    ("spec.stages[].tokenizer.vocabSize", "must be at least 300"): {"stages.tok.tokenizer.vocabSize": "299"},
    ("spec.stages[].tokenizer.vocabSize", "must be at most"): {"stages.tok.tokenizer.vocabSize": "1.1M"},
    ("spec.stages[].tokenizer.sampleBytes", "must be at least 1"): {"stages.tok.tokenizer.sampleBytes": 0},
    ("spec.stages[].tokenizer.sampleBytes", "must be at most"): {"stages.tok.tokenizer.sampleBytes": 10**15 + 1},
    ("spec.stages[].shards.shardBytes", "must be at least 65536"): {"stages.tokens.shards.shardBytes": "63Ki"},
    ("spec.stages[].shards.shardBytes", "must be at most"): {"stages.tokens.shards.shardBytes": "1024Ti"},
    ("spec.stages[].pretrain", "parallelism.tensor must divide the model's kvHeads"): {
        "stages.base.pretrain.parallelism.tensor": 4,
        "stages.base.compute": {"ranksPerNode": 4},
    },
    ("spec.stages[].pretrain", "parallelism.tensor must divide the model's ffnHiddenSize"): {
        "stages.base.pretrain.model": {"preset": "llama-nano", "ffnHiddenSize": 383},
    },
    ("spec.stages[].pretrain", "parallelism.pipeline must divide"): {
        "stages.base.pretrain.parallelism": {"pipeline": 3},
        "stages.base.compute": {"ranksPerNode": 3},
    },
    ("spec.stages[].pretrain", "schedule.warmup must be below"): {"stages.base.pretrain.schedule": {"warmup": 489}},
    ("spec.stages[].pretrain.model", "set a preset, or layers"): {"stages.base.pretrain.model": {"layers": 4}},
    ("spec.stages[].pretrain.model", "hiddenSize must be"): {"stages.base.pretrain.model": {"preset": "llama-nano", "hiddenSize": 132}},
    ("spec.stages[].pretrain.model", "kvHeads must divide heads"): {"stages.base.pretrain.model": {"preset": "llama-nano", "kvHeads": 8}},
    ("spec.stages[].pretrain.tokens", "must be at least 1"): {"stages.base.pretrain.tokens": "0"},
    ("spec.stages[].pretrain.tokens", "must be at most"): {"stages.base.pretrain.tokens": "1000.1T"},
    ("spec.stages[].pretrain.schedule", "minLearningRate must be"): {"stages.base.pretrain.schedule": {"minLearningRate": 1}},
    ("spec.stages[].pretrain.checkpoint.every", "must be above 0"): {"stages.base.pretrain.checkpoint": {"every": "0.0m"}},
    ("spec.stages[].evaluate.maxTokens", "must be at least 2"): {"stages.eval.evaluate.maxTokens": "1"},
    ("spec.stages[].evaluate.maxTokens", "must be at most"): {"stages.eval.evaluate.maxTokens": "9999999T"},
    ("spec.stages[].evaluate", "require: bound one of"): {"stages.eval.evaluate.require": {"accuracy": ">1"}},
    ("spec.stages[].evaluate.exactMatch[].uri", "only S3"): {"stages.eval.evaluate.exactMatch": [{"name": "a", "uri": "gs://bucket/x"}]},
    ("spec", "evaluate.exactMatch.uri"): {"stages.eval.evaluate.exactMatch": [{"name": "a", "uri": "questions.jsonl"}]},
    ("spec.trainer.gpuMemory", "must be at least 1"): {"trainer.gpuMemory": "0Gi"},
    ("spec.trainer.gpuMemory", "must be at most"): {"trainer.gpuMemory": "1001T"},
    ("spec.stages[].dpo", "labelSmoothing is of"): {"stages.tuned": {"dpo": {**_TUNED, "labelSmoothing": 0.1}}},
    ("spec.stages[].dpo", "lengthNormalized is of"): {
        "stages.tuned": {"dpo": {**_TUNED, "loss": "simpo", "lengthNormalized": True}},
    },
    ("spec.stages[].dpo", "gamma is of"): {"stages.tuned": {"dpo": {**_TUNED, "gamma": 0.5}}},
    ("spec.stages[].dpo", "desirableWeight is of"): {"stages.tuned": {"dpo": {**_TUNED, "desirableWeight": 2}}},
    ("spec.stages[].dpo", "undesirableWeight is of"): {"stages.tuned": {"dpo": {**_TUNED, "undesirableWeight": 2}}},
    ("spec.stages[].dpo", "globalBatchSize: kto takes"): {
        "stages.tuned": {"dpo": {**_TUNED, "loss": "kto", "globalBatchSize": 1}},
    },
    **_offline("sft"),
    **_offline("reward"),
    **_offline("dpo"),
    **_rl(),
    **_constitutional(),
}  # fmt: skip
"""Where a rule stands and how its message begins -> what to change in a good manifest, so that this rule alone refuses it."""


def rules(schema: Json, path: str = "") -> Iterator[tuple[str, str]]:
    """Place and message of every CEL rule of a definition."""
    yield from ((path, rule["message"]) for rule in schema.get("x-kubernetes-validations", []))
    for name, node in schema.get("properties", {}).items():
        yield from rules(node, f"{path}.{name}".lstrip("."))
    for key, suffix in (("items", "[]"), ("additionalProperties", "{}")):
        if isinstance(schema.get(key), dict):
            yield from rules(schema[key], path + suffix)


def _all_rules() -> list[tuple[str, str]]:
    definitions = (crd.run_crd(), crd.runtime_crd())
    schemas = [d["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for d in definitions]
    return [rule for schema in schemas for rule in rules(schema)]


def _case_of(path: str, message: str) -> Json | None:
    return next(
        (changes for (where, begins), changes in CASES.items() if where == path and message.startswith(begins)), None
    )


def _changed(changes: Json, *, value: Json) -> Json:
    """A good object with some fields changed; stages are named by their names."""
    value = copy.deepcopy(value)
    for path, new in changes.items():
        node: Any = value if path.startswith("metadata") else value["spec"]
        *parents, last = path.split(".")
        for part in parents:
            node = next(s for s in node if s["name"] == part) if isinstance(node, list) else node.setdefault(part, {})
        if new is NOTHING:
            del node[last]
        elif isinstance(node, list):
            stage = {"name": last, **copy.deepcopy(new)}
            named = [i for i, s in enumerate(node) if s["name"] == last]
            # A stage of a new name comes after the one that trains.
            i = named[0] if named else [s["name"] for s in node].index("base") + 1
            node[i : i + len(named)] = [stage]
        else:
            node[last] = copy.deepcopy(new)
    return value


class Admission:
    """Asks an API server, over one connection, whether it would take an object."""

    def __init__(self, control_plane: Any) -> None:
        config = json.loads(control_plane.kubeconfig.read_text())
        cluster = config["clusters"][0]["cluster"]
        trusting = ssl.create_default_context(cafile=cluster["certificate-authority"])
        self._connection = http.client.HTTPSConnection("127.0.0.1", control_plane.port, context=trusting)
        self._headers = {
            "Authorization": f"Bearer {config['users'][0]['user']['token']}",
            "Content-Type": "application/json",
        }

    def refusals(self, value: Json) -> list[str]:
        """What the server says against an object; nothing if it takes it."""
        answer = self.create(value)
        if answer.get("kind") != "Status":
            return []
        return [c["message"] for c in answer.get("details", {}).get("causes", [])] or [answer["message"]]

    def create(self, value: Json) -> Json:
        """The server's answer: the object with its defaults, or a Status."""
        of_runtimes = value.get("kind") == "TrainingRuntime"
        collection = "trainingruntimes" if of_runtimes else "namespaces/default/trainingruns"
        address = f"/apis/headrace.dev/v1alpha1/{collection}?dryRun=All&fieldValidation=Strict"
        self._connection.request("POST", address, json.dumps(value).encode(), self._headers)
        answer: Json = json.loads(self._connection.getresponse().read())
        assert answer.get("code", 0) < 500, answer
        return answer


@pytest.fixture(scope="module")
def admission(control_plane: Any) -> Admission:
    return Admission(control_plane)


def test_every_rule_has_a_case_and_every_case_a_rule() -> None:
    found = _all_rules()
    assert [rule for rule in found if _case_of(*rule) is None] == []
    used = {id(_case_of(*rule)) for rule in found}
    assert [key for key, changes in CASES.items() if id(changes) not in used] == []
    assert len(CASES) == len(found)


@pytest.mark.parametrize(("path", "begins"), CASES, ids=[f"{path}: {begins}" for path, begins in CASES])
def test_a_rule_refuses_alone_what_it_is_there_to_refuse(admission: Admission, path: str, begins: str) -> None:
    of_runtimes = path.startswith("spec.trainer")
    value = _changed(CASES[path, begins], value=RUNTIME if of_runtimes else manifest())
    refusals = admission.refusals(value)
    assert refusals and all(begins in refusal for refusal in refusals), refusals
    with pytest.raises(ValueError):  # pydantic's errors and ours are both
        TrainingRuntime.model_validate(value) if of_runtimes else parse_run(value, body=Body.CLUSTER)


@pytest.mark.parametrize("kind", ["", *TUNED])
def test_a_good_manifest_is_taken_with_the_defaults_of_the_classes(admission: Admission, kind: str) -> None:
    """The plain stages alone, and then one more that starts from a model."""
    value = _changed(_tuned(kind), value=manifest()) if kind else manifest()
    assert admission.refusals(value) == []
    assert parse_run(admission.create(value), body=Body.CLUSTER).spec == parse_run(value).spec


ORIGINS: list[tuple[Json, bool]] = [
    ({"from": {"model": "base"}}, True),
    ({"base": {"uri": "s3://models/llama"}}, True),
    ({"base": {"uri": "/models/llama"}}, True),
    ({}, False),
    ({"from": {"model": "base"}, "base": {"uri": "s3://models/llama"}}, False),
    ({"base": {"uri": "models/llama"}}, False),
    ({"base": {"uri": "gs://models/llama"}}, False),
    ({"base": {}}, False),
]


@pytest.mark.parametrize("kind", ["sft", "reward", "rl", "dpo", "constitutional"])
def test_both_take_and_refuse_the_same_models_to_start_from(admission: Admission, kind: str) -> None:
    for origin, taken in ORIGINS:
        value = manifest("corpus", "tok", "tokens", "base")
        block = {"data": _RECORDS, **_NEEDED.get(kind, {}), **origin}
        value["spec"]["stages"].append({"name": "tuned", kind: block})
        if kind not in ("reward", "constitutional"):
            reader = {"name": "eval", "evaluate": {"from": {"model": "tuned", "shards": "tokens"}}}
            value["spec"]["stages"].append(reader)
        assert (admission.refusals(value) == []) == taken, (origin, admission.refusals(value))
        try:
            parse_run(value, body=Body.CLUSTER)
        except ManifestError as error:
            assert not taken, error.problems
        else:
            assert taken, origin


def _as_kubectl_sends(value: Any) -> Any:
    """A value as Go writes it: 16.0 is 16 there. (Sent as 16.0, CEL calls it no integer; stored objects never hold it.)"""
    if isinstance(value, dict):
        return {k: _as_kubectl_sends(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_as_kubectl_sends(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e21 else value


def test_the_api_server_and_the_operator_refuse_the_same_manifests(admission: Admission) -> None:
    """In both directions, and what both take they read alike. There is no rule that only one of them knows."""
    source, verdicts = Manifests(random.Random(seed_of_this_test())), Counter[bool]()
    for i in range(COUNT):
        value = _as_kubectl_sends(source.mutated())
        answer, problems = admission.create(value), []
        try:
            run = parse_run(value, body=Body.CLUSTER)
        except ManifestError as error:
            problems = error.problems
        taken = answer.get("kind") == "TrainingRun"
        assert taken == (not problems), (
            f"manifest {i}, {source.done}: server: {answer.get('message', 'yes')}; operator: {problems or 'yes'}"
        )
        if taken:
            assert parse_run(answer, body=Body.CLUSTER).spec == run.spec, f"manifest {i}, {source.done}"
        verdicts[taken] += 1
    assert min(verdicts[True], verdicts[False]) > COUNT // 10, f"{verdicts}: the generator has lost its bite"


def test_a_runtime_that_the_api_server_takes_is_one_that_the_operator_reads(admission: Admission) -> None:
    """Whatever else an admin writes: a runtime that cannot be read would stop every run that names it."""
    source, taken = Manifests(random.Random(seed_of_this_test()), schema=runtime_schema()), 0
    for i in range(COUNT // 5):
        answer = admission.create(source.changed(RUNTIME))
        if answer["kind"] == "TrainingRuntime":
            taken += 1
            read = TrainingRuntime.model_validate(answer)
            assert read.spec.trainer.image == answer["spec"]["trainer"]["image"], f"runtime {i}, {source.done}"
    assert taken > COUNT // 50


def test_kubectl_reads_scalars_as_the_command_line_does(control_plane: Any) -> None:
    body = "".join(f"  - {text}\n" for text, _ in PLAIN_SCALARS)
    text = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: x}}\ndata:\n{body}"
    said = control_plane.kubectl("create", "--dry-run=client", "--validate=false", "-o", "json", "-f", "-", stdin=text)
    theirs = json.loads(said)["data"]
    differing = [(t, ours, them) for (t, ours), them in zip(PLAIN_SCALARS, theirs, strict=True) if ours != them]
    assert differing == []
