"""Generates the CustomResourceDefinitions. ``python -m headrace_api.crd`` writes them, ``--check`` compares.

In: the pydantic classes. Out: structural OpenAPI schemas with descriptions, defaults, bounds, CEL rules and columns.
Checks that CEL can express are also CEL rules, so that the API server rejects a manifest with the same remedy.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from headrace_api import GROUP, VERSION
from headrace_api.base import cel_number, rule
from headrace_api.run import TrainingRun
from headrace_api.runtime import TrainingRuntime

Schema = dict[str, Any]

FOLDERS = ("manifests/crd", "charts/headrace/files/crd")
"""Where the files go, relative to the repository root. Helm reads only files inside the chart."""

_BOUND = 1_048_576
"""The default bound of a string's length (_ITEMS: a list's). CEL's cost estimate needs one."""
_ITEMS = 64
_DROPPED = ("title", "$defs", "additionalProperties", "propertyNames", "default")

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


def run_crd() -> Schema:
    """The CustomResourceDefinition of TrainingRun."""
    schema = _object_schema(TrainingRun)
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
    raw = model.model_json_schema()
    schema = _structural(raw, raw["$defs"])
    # The API server owns these three; a full schema of ours would only interfere.
    schema["properties"]["apiVersion"] = {"type": "string"}
    schema["properties"]["kind"] = {"type": "string"}
    name = schema["properties"]["metadata"]["properties"]["name"]
    schema["properties"]["metadata"] = {"type": "object", "properties": {"name": name}}
    schema["required"] = ["spec"]
    if "status" in schema["properties"]:
        schema["properties"]["status"] = _without_defaults(schema["properties"]["status"])
    return schema


def _without_defaults(node: Any) -> Any:
    """A status holds observations: the API server must not fill in defaults."""
    if isinstance(node, list):
        return [_without_defaults(v) for v in node]
    if not isinstance(node, dict):
        return node
    return {k: _without_defaults(v) for k, v in node.items() if k != "default"}


def _structural(node: Schema, defs: Schema) -> Schema:
    """A schema node in Kubernetes' dialect: no references, no unions with null, every list and string bounded."""
    node = _resolve(node, defs)
    default = node.get("default")
    out = {k: v for k, v in node.items() if k not in _DROPPED}
    if "properties" in node:
        required = node.get("required", [])
        out["properties"] = {k: _property(v, defs, required=k in required) for k, v in node["properties"].items()}
    if "items" in node:
        out |= {"items": _structural(node["items"], defs), "maxItems": node.get("maxItems", _ITEMS)}
        out |= _list_kind(out["items"])
    if out.get("type") == "object" and "properties" not in out and not out.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = _structural(node["additionalProperties"], defs)
        out.setdefault("maxProperties", _ITEMS)
    _bound_numbers(out)
    if out.get("type") == "string" and "enum" not in out and "format" not in out:
        out.setdefault("maxLength", _BOUND)
    if out.get("x-kubernetes-int-or-string"):
        _bound_quantity(out)
    if default is not None:
        out["default"] = default
    return out


def _property(node: Schema, defs: Schema, *, required: bool) -> Schema:
    """A field's schema. An optional, non-nullable block defaults to what its class says, spelled out: Kubernetes checks a
    default against the block's rules before it fills in any other default."""
    out = _structural(node, defs)
    may_be_nothing = any(option.get("type") == "null" for option in node.get("anyOf", []))
    if "properties" in out and not required and not may_be_nothing:
        of_fields = {k: v["default"] for k, v in out["properties"].items() if "default" in v}
        out["default"] = of_fields | {k: v for k, v in out.get("default", {}).items() if v is not None}
    return out


def _resolve(node: Schema, defs: Schema) -> Schema:
    """Resolve ``$ref`` and ``X | None``. The field's own description wins over the class's."""
    options = [o for o in node.get("anyOf", []) if o.get("type") != "null"]
    if len(options) == 1:
        node = {**options[0], **{k: v for k, v in node.items() if k != "anyOf"}}
    if "$ref" in node:
        merged = {**defs[node["$ref"].rpartition("/")[2]], **{k: v for k, v in node.items() if k != "$ref"}}
        return _resolve(merged, defs)
    return node


def _list_kind(items: Schema) -> Schema:
    """Under server-side apply, lists of named items merge by name, conditions by type; others are replaced whole."""
    properties = items.get("properties", {})
    for key in ("name", "type"):
        if key in properties and key in items.get("required", []):
            return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
    return {"x-kubernetes-list-type": "atomic"}


def _bound_numbers(out: Schema) -> None:
    """Kubernetes writes exclusive bounds as a flag next to the bound, and wants a format for integers."""
    for exclusive, plain in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in out:
            out[plain], out[exclusive] = out[exclusive], True
    if out.get("type") == "integer":
        out["format"] = "int64"


def _bound_quantity(out: Schema) -> None:
    """Turn the bounds of a quantity into a CEL rule: ``minimum`` does not apply to text."""
    for names, compare, words in ((("minimum", "ge"), ">=", "at least"), (("maximum", "le"), "<=", "at most")):
        for bound in [out.pop(name) for name in names if name in out]:
            cel = f"{cel_number('self')} {compare} {bound}.0"
            rules = out.get("x-kubernetes-validations", [])
            out["x-kubernetes-validations"] = [*rules, rule(cel, f"must be {words} {bound}")]


def render(crd: Schema) -> str:
    """The text of a CRD file."""
    text: str = yaml.dump(crd, Dumper=_WithoutAliases, sort_keys=False, width=120)
    return "# Generated by `python -m headrace_api.crd`; do not edit.\n" + text


class _WithoutAliases(yaml.SafeDumper):
    """Writes what stages share out in each of them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def files() -> Iterator[tuple[str, str]]:
    """Path relative to the repository root -> text."""
    for folder in FOLDERS:
        for crd in (run_crd(), runtime_crd()):
            yield f"{folder}/{crd['metadata']['name']}.yaml", render(crd)


def main(argv: list[str]) -> int:
    """Write the files below the working directory; with ``--check``, report the stale ones instead."""
    stale = [path for path, text in files() if not Path(path).exists() or Path(path).read_text() != text]
    if "--check" in argv:
        for path in stale:
            print(f"{path}: out of date; run `make crds`")
        return 1 if stale else 0
    for path, text in files():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
