"""Generates the CustomResourceDefinitions: ``python -m headrace_api.crd`` writes them, ``--check`` compares.

In: the pydantic classes. Out: structural OpenAPI schemas with descriptions, defaults, bounds, CEL rules and columns.
What pydantic checks and CEL can say is also a CEL rule, so that the API server refuses it with the same remedy.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from headrace_api import GROUP, VERSION
from headrace_api.model import PRESETS
from headrace_api.run import MAX_NAMES, TrainingRun
from headrace_api.runtime import TrainingRuntime
from headrace_api.stages import KINDS

Schema = dict[str, Any]

FOLDERS = ("manifests/crd", "charts/headrace/files/crd")
"""Where the files are written, below the repository's root. Helm reads only what is inside the chart."""

_BOUND = 1_048_576
"""The length of a string, and _ITEMS that of a list, that has no bound of its own: CEL's cost is estimated from them."""
_ITEMS = 64
_DROPPED = ("title", "$defs", "additionalProperties", "discriminator", "examples")

_COLUMNS = [
    ("Stage", "string", ".status.stage"),
    ("Status", "string", ".status.summary"),
    ("Step", "string", ".status.step"),
    ("Progress", "string", ".status.progress"),
    ("Loss", "string", ".status.loss"),
    ("Tok/s", "string", ".status.tokensPerSecond"),
    ("Restarts", "integer", ".status.restarts"),
    ("ETA", "string", ".status.eta"),
    ("Age", "date", ".metadata.creationTimestamp"),
]


def _rule(rule: str, message: str) -> Schema:
    return {"rule": rule, "message": message}


def _divides(field: str, dimension: str) -> Schema:
    """``field`` of ``parallelism`` must divide a dimension of the model: the one that is written, or its preset's."""
    of_presets = ", ".join(f"'{name}': {arch.dump()[dimension]}" for name, arch in sorted(PRESETS.items()))
    stated = f"(has(self.model.{dimension}) ? self.model.{dimension} : {{{of_presets}}}[self.model.preset])"
    return _rule(
        f"{stated} % self.parallelism.{field} == 0",
        f"parallelism.{field} must divide the model's {dimension}; choose a divisor of it",
    )


_ONE_BLOCK = " + ".join(f"(has(self.{kind}) ? 1 : 0)" for kind in KINDS)
_WORLD = "self.compute.nodes * (has(self.compute.ranksPerNode) ? self.compute.ranksPerNode : (self.compute.gpusPerNode > 0 ? self.compute.gpusPerNode : 1))"
_REPLICA = "(self.pretrain.parallelism.tensor * self.pretrain.parallelism.pipeline)"

_RULES: dict[str, list[Schema]] = {
    "Stage": [
        _rule(f"{_ONE_BLOCK} == 1", f"a stage has exactly one typed block of {', '.join(KINDS)}"),
        _rule(
            f"!has(self.pretrain) || ({_WORLD}) % {_REPLICA} == 0",
            "parallelism.tensor x parallelism.pipeline must divide the ranks of the gang, compute.nodes x compute.ranksPerNode",
        ),
        _rule(
            "!has(self.pretrain) || self.pretrain.precision != 'fp8' || self.compute.gpusPerNode > 0",
            "precision fp8 needs GPUs with Transformer Engine; set compute.gpusPerNode, or use bf16",
        ),
    ],
    "Pretrain": [_divides("tensor", "heads"), _divides("tensor", "kvHeads"), _divides("pipeline", "layers")],
    "ModelSpec": [
        _rule(
            "has(self.preset) || (has(self.layers) && has(self.hiddenSize) && has(self.heads) && has(self.kvHeads) && has(self.ffnHiddenSize))",
            "set a preset, or layers, hiddenSize, heads, kvHeads and ffnHiddenSize",
        ),
    ],
    "Tokenizer": [
        _rule(
            "has(self.from) != has(self.import)", "set either from.corpus, to train, or import.uri, to read; not both"
        ),
    ],
    "RunSpec": [
        _rule(
            "has(self.storage.uri)",
            "storage.uri is unset: write s3://bucket/prefix, or a directory that every pod mounts",
        ),
        _rule("self.stages.all(s, self.stages.exists_one(t, t.name == s.name))", "stage names must be unique in a run"),
    ],
}
"""CEL rules by the name of the class that they are put on."""

_ROOT_RULES = [
    _rule(
        "!self.metadata.name.contains('--')",
        "metadata.name has two hyphens in a row, which join names; use one of them",
    ),
    _rule(
        f"self.spec.stages.all(s, size(s.name) + size(self.metadata.name) <= {MAX_NAMES})",
        f"the run's name and a stage's name have more than {MAX_NAMES} characters together, too many for a pod's host name",
    ),
]


def run_crd() -> Schema:
    """The CustomResourceDefinition of TrainingRun."""
    schema = _object_schema(TrainingRun)
    schema["x-kubernetes-validations"] = _ROOT_RULES
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [{"name": n, "type": t, "jsonPath": p} for n, t, p in _COLUMNS],
        "schema": {"openAPIV3Schema": schema},
    }
    return _crd("TrainingRun", "trainingruns", scope="Namespaced", short="trun", version=version)


def runtime_crd() -> Schema:
    """The CustomResourceDefinition of TrainingRuntime."""
    columns = [
        {"name": "Image", "type": "string", "jsonPath": ".spec.trainer.image"},
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    ]
    schema = {"openAPIV3Schema": _object_schema(TrainingRuntime)}
    version = {"name": VERSION, "served": True, "storage": True, "additionalPrinterColumns": columns, "schema": schema}
    return _crd("TrainingRuntime", "trainingruntimes", scope="Cluster", short="truntime", version=version)


def _crd(kind: str, plural: str, *, scope: str, short: str, version: Schema) -> Schema:
    names = {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower(), "shortNames": [short]}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {"group": GROUP, "scope": scope, "names": {**names, "categories": ["headrace"]}, "versions": [version]},
    }


def _object_schema(model: type[TrainingRun] | type[TrainingRuntime]) -> Schema:
    raw = model.model_json_schema(by_alias=True, mode="validation")
    schema = _structural(raw, raw.get("$defs", {}), name=model.__name__)
    # The API server owns these three; a schema of ours would only get in its way.
    schema["properties"]["apiVersion"] = {"type": "string"}
    schema["properties"]["kind"] = {"type": "string"}
    schema["properties"]["metadata"] = {"type": "object"}
    schema["required"] = ["spec"]
    if "status" in schema["properties"]:
        schema["properties"]["status"] = _without_defaults(schema["properties"]["status"])
    return schema


def _without_defaults(node: Any) -> Any:
    """A status is what was observed: the API server must not fill anything in."""
    if isinstance(node, list):
        return [_without_defaults(v) for v in node]
    if not isinstance(node, dict):
        return node
    return {k: _without_defaults(v) for k, v in node.items() if k != "default" or (isinstance(v, dict) and "type" in v)}


def _structural(node: Schema, defs: Schema, *, name: str = "") -> Schema:
    """A JSON schema node as Kubernetes wants it: no references, no unions with null, every list and string bounded."""
    node, name = _resolve(node, defs, name)
    default = node.get("default")
    out = {k: v for k, v in node.items() if k not in (*_DROPPED, "default", "anyOf", "allOf", "const")}
    if "const" in node:
        out |= {"type": "string", "enum": [node["const"]]}
    if "properties" in node:
        required = node.get("required", [])
        out["properties"] = {k: _property(v, defs, required=k in required) for k, v in node["properties"].items()}
    if "items" in node:
        out |= {"items": _structural(node["items"], defs), "maxItems": node.get("maxItems", _ITEMS)}
        out |= _list_kind(out["items"])
    if out.get("type") == "object" and "properties" not in out and not out.get("x-kubernetes-preserve-unknown-fields"):
        values = node.get("additionalProperties")
        out["additionalProperties"] = _structural(values, defs) if isinstance(values, dict) else {"type": "string"}
        out.setdefault("maxProperties", _ITEMS)
    out.pop("propertyNames", None)
    out.pop("patternProperties", None)
    _bound_numbers(out)
    if out.get("type") == "string" and "enum" not in out and "format" not in out:
        out.setdefault("maxLength", _BOUND)
    if out.get("format") == "date-time":
        out.pop("maxLength", None)
    if name in _RULES:
        out["x-kubernetes-validations"] = _RULES[name]
    if default is not None:
        out["default"] = default
    return out


def _property(node: Schema, defs: Schema, *, required: bool) -> Schema:
    """A field's schema. A block that may be left out, and is not nothing then, defaults to ``{}``: the API server fills
    that from the defaults below it."""
    out = _structural(node, defs)
    may_be_nothing = any(option.get("type") == "null" for option in node.get("anyOf", []))
    if "properties" in out and not required and not may_be_nothing:
        out["default"] = {}
    return out


def _resolve(node: Schema, defs: Schema, name: str) -> tuple[Schema, str]:
    """Follow ``$ref`` and ``X | None``; what the referring field says (its description) wins over the class."""
    options = [o for o in node.get("anyOf", []) if o.get("type") != "null"]
    if len(options) == 1:
        node = {**options[0], **{k: v for k, v in node.items() if k != "anyOf"}}
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        merged = {**defs[name], **{k: v for k, v in node.items() if k != "$ref"}}
        return _resolve(merged, defs, name)
    return node, name


def _list_kind(items: Schema) -> Schema:
    """Lists of named things merge by name under server-side apply, conditions by type; others are replaced whole."""
    properties = items.get("properties", {})
    for key in ("name", "type"):
        if key in properties and key in items.get("required", []):
            return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
    return {"x-kubernetes-list-type": "atomic"}


def _bound_numbers(out: Schema) -> None:
    """Kubernetes spells exclusive bounds as a flag beside the bound, and wants a format for integers."""
    for exclusive, plain in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in out:
            out[plain], out[exclusive] = out[exclusive], True
    if out.get("type") == "integer":
        out["format"] = "int64"


def render(crd: Schema) -> str:
    """The file's text."""
    return "# Generated by `python -m headrace_api.crd`; do not edit.\n" + yaml.safe_dump(
        crd, sort_keys=False, width=120
    )


def files() -> Iterator[tuple[str, str]]:
    """Path below the repository's root -> text."""
    for folder in FOLDERS:
        for crd in (run_crd(), runtime_crd()):
            yield f"{folder}/{crd['metadata']['name']}.yaml", render(crd)


def main(argv: list[str]) -> int:
    """Write the files below the working directory, or with ``--check`` say which differ."""
    stale = [path for path, text in files() if not Path(path).exists() or Path(path).read_text() != text]
    if "--check" in argv:
        for path in stale:
            print(f"{path}: differs from the classes; run `make crds`")
        return 1 if stale else 0
    for path, text in files():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
