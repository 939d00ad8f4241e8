"""Random manifests: valid ones, and the mistakes that people, tools and bad luck make.

Everything comes from one ``random.Random``, whose seed tests print, and take from HEADRACE_TEST_SEED. Values are drawn
from the generated CustomResourceDefinition, so that a new field is tried without a line here.
"""

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from builders import STAGES, manifest
from headrace_api import crd

Json = dict[str, Any]


def seed_of_this_test() -> int:
    """HEADRACE_TEST_SEED, or a new seed; printed, so that a failure can be repeated."""
    seed = int(os.environ.get("HEADRACE_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"HEADRACE_TEST_SEED={seed}")
    return seed


NAMES = [
    "corpus",
    "tok",
    "tokens",
    "base",
    "eval",
    "ship",
    "serve",
    "x",
    "a-b",
    "Base",
    "1st",
    "a.b",
    "a" * 40,
    "a" * 41,
    "",
]
TEXTS = [
    "/raw", "raw", "s3://bucket/raw", "s3://b", "s3://", "file:///raw", "file://raw", "gs://bucket/x", "https://host/x",
    "~/text", "", "a b", "a\tb", "a\nb", "a\x00b", "é", "x" * 1025, "a://b", ":", "://", "en", "eng", "text", "on", "none",
    "http://127.0.0.1:9000", "us-east-1", "us east", "perplexity", "fp8", "llama-nano", "llama-1b", "cosine",
]  # fmt: skip
QUANTITIES: list[Any] = [
    1, 0, -1, 300, 299, 4096, 65536, 10**6, 10**15, 10**15 + 1, 2**63, 1e6, 2.5, "1M", "2.05M", "1.5k", "1.2345k", "64Ki",
    "1.5Gi", "1.3Gi", "0", "0.0k", "00", "7", "007", "7B", "1e6", "-1", "1 M", "1M\n", "\u0663", "99999999999999999T", "G",
    "999T", "1000T", "1001T", "30m", "100ms", "0s", "0.0h", "1.5h", "1d", "soon", "4", "500m", "0m", "0.5", "1000000",
]  # fmt: skip
BOUNDS = [">=3", "<40", "<= 40", ">1.5", "> 1.", ">", "3", ">=3\n", ">=-1", "=3", ">1e3"]
ZOO: list[Any] = [
    None, True, False, 0, 1, -1, 2, 16.0, 1.5, 1e30, 10**19, "", "x", "16", "yes", "2024-01-01", [], {}, [1], [None],
    {"a": 1}, {"name": "x"}, "y" * 2000, [[[]]], "\u2028",
]  # fmt: skip


def run_schema() -> Json:
    """The schema of a TrainingRun's spec."""
    return _spec_schema(crd.run_crd())


def runtime_schema() -> Json:
    """The schema of a TrainingRuntime's spec."""
    return _spec_schema(crd.runtime_crd())


def _spec_schema(definition: Json) -> Json:
    schema: Json = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return schema


@dataclass
class Manifests:
    """A source of manifests.

    Attributes:
        done: what was done to the newest one.
    """

    rng: random.Random
    done: list[str] = field(default_factory=list)
    schema: Json = field(default_factory=run_schema)

    def mutated(self) -> Json:
        """A valid manifest with up to four changes; about half of them leave it valid."""
        value = self.valid()
        self.done = []
        for _ in range(self.rng.choice([0, 1, 1, 1, 2, 2, 3, 4])):
            change = self.rng.choice(_CHANGES)
            change(self, value)
        return value

    def changed(self, value: Json) -> Json:
        """Any other object, with up to two fields of its spec changed."""
        value, self.done = copy.deepcopy(value), []
        for _ in range(self.rng.choice([0, 1, 2])):
            self.rng.choice([_set_field, _retype, _drop, _misspell])(self, value)
        return value

    def valid(self) -> Json:
        """A manifest that describes a run."""
        names = list(STAGES)[: self.rng.randint(1, len(STAGES))]
        value = manifest(*names)
        if "base" in names and self.rng.random() < 0.7:
            stage = next(s for s in value["spec"]["stages"] if s["name"] == "base")
            self._lay_out(stage)
        return value

    def _lay_out(self, stage: Json) -> None:
        tensor, pipeline, data = self.rng.choice([1, 2]), self.rng.choice([1, 2, 4]), self.rng.choice([1, 2, 3])
        micro = self.rng.choice([1, 2])
        gpus = self.rng.random() < 0.3
        ranks = tensor * pipeline * data
        stage["compute"] = {"gpusPerNode": ranks} if gpus and ranks <= 16 else {"ranksPerNode": ranks}
        stage["pretrain"] |= {
            "parallelism": {"tensor": tensor, "pipeline": pipeline},
            "microBatchSize": micro,
            "globalBatchSize": micro * data * self.rng.choice([1, 2, 3]),
        }

    def sample(self, schema: Json) -> Any:
        """A value for a field; more often than not one that it takes."""
        if "enum" in schema:
            return self.rng.choice([*schema["enum"], *schema["enum"], "other"])
        if schema.get("x-kubernetes-int-or-string"):
            return self.rng.choice(QUANTITIES)
        kind = schema.get("type")
        if kind == "object":
            return self._sample_block(schema)
        if kind == "array":
            least = schema.get("minItems", 0)
            return [self.sample(schema["items"]) for _ in range(self.rng.choice([0, least, least, least + 1, 2]))]
        if kind == "boolean":
            return self.rng.choice([True, False])
        return self._sample_number(schema) if kind in ("integer", "number") else self._sample_text(schema)

    def _sample_block(self, schema: Json) -> Json:
        if "properties" not in schema:
            keys = self.rng.sample(["loss", "perplexity", "unigramRatio", "accuracy"], self.rng.randint(0, 2))
            return {key: self.rng.choice(BOUNDS) for key in keys}
        required = schema.get("required", [])
        return {
            name: self.sample(node)
            for name, node in schema["properties"].items()
            if name in required or self.rng.random() < 0.15
        }

    def _sample_number(self, schema: Json) -> Any:
        least, most = schema.get("minimum", 0), schema.get("maximum", 10**6)
        edges = [least - 1, least, most, most + 1]
        near = [least + 1, least + 2, 8, 16, 0.5, schema.get("default", 4)]
        return self.rng.choice([*edges, *near, *near])

    def _sample_text(self, schema: Json) -> str:
        if schema.get("maxLength") == 40:
            return self.rng.choice(NAMES)
        return self.rng.choice([*TEXTS, *BOUNDS] if "<" in schema.get("pattern", "") else TEXTS)


def _blocks(value: Json, schema: Json, path: str = "spec") -> Iterator[tuple[str, Json, Json]]:
    """Every block of a spec with its place and its schema."""
    if not isinstance(value, dict):
        return
    yield path, value, schema
    for key, node in list(value.items()):
        inner = schema.get("properties", {}).get(key)
        if inner is None:
            continue
        if isinstance(node, list):
            for i, item in enumerate(node):
                yield from _blocks(item, inner.get("items", {}), f"{path}.{key}[{i}]")
        else:
            yield from _blocks(node, inner, f"{path}.{key}")


def _block(source: Manifests, value: Json) -> tuple[str, Json, Json]:
    return source.rng.choice(list(_blocks(value["spec"], source.schema)))


def _set_field(source: Manifests, value: Json) -> None:
    path, block, schema = _block(source, value)
    if properties := schema.get("properties"):
        name = source.rng.choice(list(properties))
        block[name] = source.sample(properties[name])
        source.done.append(f"{path}.{name} = {block[name]!r:.60}")


def _retype(source: Manifests, value: Json) -> None:
    path, block, schema = _block(source, value)
    names = list(block) or list(schema.get("properties", {}))
    if names:
        name = source.rng.choice(names)
        block[name] = copy.deepcopy(source.rng.choice(ZOO))
        source.done.append(f"{path}.{name} := {block[name]!r:.60}")


def _retype_top(source: Manifests, value: Json) -> None:
    name = source.rng.choice(list(value))
    value[name] = copy.deepcopy(source.rng.choice([*ZOO, "TrainingRum", "headrace.dev/v1beta1"]))
    source.done.append(f"{name} := {value[name]!r:.60}")
    if not isinstance(value.get("spec"), dict):
        value["spec"] = {}


def _drop(source: Manifests, value: Json) -> None:
    path, block, _ = _block(source, value)
    if block:
        name = source.rng.choice(list(block))
        del block[name]
        source.done.append(f"{path}.{name} dropped")


def _misspell(source: Manifests, value: Json) -> None:
    path, block, schema = _block(source, value)
    names = list(block) or list(schema.get("properties", {}))
    if names:
        name = source.rng.choice(names)
        other = source.rng.choice([name + "s", name[:-1], name.upper(), f"{name}_size", "nope", "a b", "\u00fc", name])
        block[other] = block.pop(name, None)
        source.done.append(f"{path}.{name} named {other!r}")


def _rename(source: Manifests, value: Json) -> None:
    stage = source.rng.choice(_stages(value))
    stage["name"] = source.rng.choice(NAMES)
    source.done.append(f"a stage named {stage['name']!r}")


def _name_the_run(source: Manifests, value: Json) -> None:
    metadata: Json = {"name": source.rng.choice([*NAMES, "r" * 40])}
    metadata |= source.rng.choice([{}, {}, {"labels": {"a": "b"}}, {"annotations": {}}, {"label": {}}, {"nope": 1}])
    value["metadata"] = metadata
    source.done.append(f"metadata = {metadata!r:.60}")


def _refer(source: Manifests, value: Json) -> None:
    found = [block for path, block, _ in _blocks(value["spec"], source.schema) if path.endswith(".from")]
    if found:
        block = source.rng.choice(found)
        slot = source.rng.choice([*block, "model"])
        block[slot] = source.rng.choice(NAMES[:9])
        source.done.append(f"from.{slot} = {block[slot]!r}")


def _reorder(source: Manifests, value: Json) -> None:
    stages = _stages(value)
    how = source.rng.choice(["shuffle", "repeat", "remove", "two blocks", "many"])
    if how == "shuffle":
        source.rng.shuffle(stages)
    elif how == "repeat":
        stages.append(copy.deepcopy(source.rng.choice(stages)))
    elif how == "remove":
        stages.remove(source.rng.choice(stages))
    elif how == "many":
        stages += [{**copy.deepcopy(stages[0]), "name": f"more-{i}"} for i in range(source.rng.choice([20, 33]))]
    else:
        stage = source.rng.choice(stages)
        stage |= copy.deepcopy(source.rng.choice(list(STAGES.values())))
    value["spec"]["stages"] = stages
    source.done.append(how)


def _lay_out_badly(source: Manifests, value: Json) -> None:
    rng, stage = source.rng, source.rng.choice(_stages(value))
    stage["compute"] = {
        name: rng.choice(numbers)
        for name, numbers in (
            ("nodes", [1, 1, 2, 3]),
            ("gpusPerNode", [0, 0, 2, 8]),
            ("ranksPerNode", [1, 2, 3, 4, 8, 16]),
        )
        if rng.random() < 0.6
    }
    if isinstance(stage.get("deploy"), dict):
        stage["deploy"]["engine"] = rng.choice(["vllm", "vllm", "transformers"])
    if isinstance(stage.get("pretrain"), dict):
        stage["pretrain"] |= {
            "parallelism": {"tensor": rng.choice([1, 2, 3, 4, 8]), "pipeline": rng.choice([1, 2, 3, 4])},
            "microBatchSize": rng.choice([1, 2, 3]),
            "globalBatchSize": rng.choice([1, 4, 6, 12, 24]),
            "precision": rng.choice(["fp32", "bf16", "fp8"]),
            "model": rng.choice(_MODELS),
            "schedule": {"warmup": rng.choice([0, 1, 10, 488, 489, 10**9])},
        }
    source.done.append(f"laid out {stage.get('compute')} {stage.get('pretrain', {})!r:.300}")


_MODELS: list[Json] = [
    {"preset": "llama-nano"}, {"preset": "llama-1b"}, {"preset": "llama-nano", "heads": 8}, {"preset": "llama-nano", "heads": 3},
    {"preset": "llama-nano", "kvHeads": 3}, {"preset": "llama-nano", "ffnHiddenSize": 385}, {"preset": "llama-nano", "layers": 6},
    {"layers": 2, "hiddenSize": 64, "heads": 4, "kvHeads": 4, "ffnHiddenSize": 128}, {"layers": 2}, {"preset": "gpt"},
    {"layers": 2, "hiddenSize": 36, "heads": 4, "kvHeads": 4, "ffnHiddenSize": 128},
]  # fmt: skip


def _nest(source: Manifests, value: Json) -> None:
    path, block, _ = _block(source, value)
    name = source.rng.choice(list(block) or ["nope"])
    node: Any = 1
    for _ in range(source.rng.choice([5, 40, 200])):
        node = source.rng.choice([[node], {"a": node}])
    block[name] = node
    source.done.append(f"{path}.{name} nested")


def _stages(value: Json) -> list[Json]:
    """The stages that are blocks; a new one if there is none."""
    stages = value["spec"].get("stages")
    found = [s for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
    return found or [{"name": "corpus", **copy.deepcopy(STAGES["corpus"])}]


_CHANGES: list[Callable[[Manifests, Json], None]] = [
    _set_field, _set_field, _set_field, _set_field, _retype, _retype, _retype_top, _drop, _misspell, _rename, _name_the_run,
    _refer, _reorder, _lay_out_badly, _lay_out_badly, _nest,
]  # fmt: skip


def as_text(value: Json, rng: random.Random) -> bytes:
    """A manifest as a file: YAML or JSON, and in one of three damaged, repeated or otherwise strange."""
    if rng.random() < 0.6:  # JSON is YAML, and is written in a tenth of the time
        text = json.dumps(value, indent=rng.choice([None, 1]))
    else:
        text = yaml.dump(value, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False)
    if rng.random() < 0.67:
        return text.encode("utf-8", "surrogatepass")
    lines = text.splitlines()
    where = rng.randrange(len(lines)) if lines else 0
    strange: list[Callable[[], str]] = [
        lambda: "\n".join([*lines[:where], rng.choice(lines or [""]), *lines[where:]]),
        lambda: "\n".join([*lines[:where], lines[where] if lines else "", *lines[where:]]),
        lambda: "\n".join([*lines[:where], "\t" + lines[where], *lines[where + 1 :]]) if lines else "\t",
        lambda: text[: rng.randrange(len(text) + 1)],
        lambda: text + "\n---\n" + rng.choice([text, "kind: Pod", "- a", "5", "", "kind: TrainingRum"]),
        lambda: "[" * rng.choice([10, 1000, 20_000]) + text,
        lambda: text.replace(": ", rng.choice([": &a ", ": *a ", ": !!str ", ": !x ", ":", ": - "]), rng.randint(1, 3)),
        lambda: text.replace(rng.choice(["1", "2", "demo", "base"]), rng.choice(_SCALARS), 1),
        lambda: text + "\na: &a [1, 2]\nb: &b [*a, *a]\nc: {<<: *b}",
    ]
    damaged = rng.choice(strange)().encode("utf-8", "surrogatepass")
    if rng.random() < 0.3 and damaged:
        at = rng.randrange(len(damaged))
        damaged = damaged[:at] + bytes([rng.randrange(256)]) + damaged[at + 1 :]
    return damaged


_SCALARS = [
    "2024-13-45", "9" * 5000, ".inf", "-.inf", ".nan", "1e400", "0x1F", "017", "08", "1_000", "12:30", "yes", "~", "''",
    '"\\ud800"', "null", "2.05M", "|", ">", "@", "`", "%", "? ", "<<", "{", "}", "0", "1.0", "16.0",
]  # fmt: skip

PLAIN_SCALARS: list[tuple[str, Any]] = [
    ("-017", -15),
    ("+017", 15),
    ("3e-4", 3e-4), ("3E4", 3e4), ("-.5", -0.5), ("1.", 1.0), ("+12", 12), ("017", 15), ("0o17", 15), ("0x1F", 31), ("0b101", 5),
    ("-0x10", -16), ("08", 8.0), ("1_000", 1000), ("1__0", 10), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"),
    ("2024-13-45", "2024-13-45"), ("y", True), ("N", False), ("On", True), ("oFF", "oFF"), ("~", None), ("NULL", None),
    ("nULL", "nULL"), ("_1", "_1"), ("1_", 1), ("0x", "0x"), ("1e", "1e"), (".", "."), ("1.2.3", "1.2.3"), ("0", 0), ("-0", 0),
    ("00", 0), ("0777", 511), ("infinity", "infinity"), ("1e3", 1000.0), ("4M", "4M"), ("TRUE", True), ("tRUE", "tRUE"),
    ("1e400", "1e400"), ("+", "+"), ("-x", "-x"), ("0o8", "0o8"), ("0b2", "0b2"), ("1.5e+3", 1500.0),
    ("9223372036854775807", 2**63 - 1), ("1e-400", 0.0), ("<", "<"), ("=", "="), ("0_7", 7), ("+.5", 0.5), (".5e1", 5.0),
]  # fmt: skip
"""What scalars without quotes mean: to this package by tests/api, to kubectl by tests/operator."""
