"""The generated CustomResourceDefinitions match the API classes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace_api import crd
from headrace_api.base import Spec
from headrace_api.stages import KINDS

ROOT = Path(__file__).resolve().parents[2]


def _walk(node: Any, path: str = ""):
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            yield from _walk(value, f"{path}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _walk(value, f"{path}[{i}]")


def _schema() -> dict[str, Any]:
    return crd.run_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def test_the_committed_files_are_what_a_new_process_generates():
    """As `make lint` asks for it. First in this file: mutants of what runs while classes are imported live only there."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "headrace_api.crd", "--check"]
    checked = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, ""), checked.stdout + checked.stderr


def test_the_committed_files_are_what_the_classes_generate():
    for path, text in crd.files():
        assert (ROOT / path).read_text() == text, f"{path} is stale; run `make crds`"


def test_a_block_that_is_left_out_is_what_its_class_says():
    """Not what the block's own class says: sft and pretrain share a schedule, and begin with other rates."""
    properties = _schema()["properties"]["spec"]["properties"]["stages"]["items"]["properties"]
    blocks = 0
    for kind, config in KINDS.items():
        for name, field in config.model_fields.items():
            default = field.get_default(call_default_factory=True)
            if isinstance(default, Spec):
                said = properties[kind]["properties"][field.alias or name]["default"]
                assert type(default).model_validate(said) == default, (kind, name)
                blocks += 1
    assert blocks > 20


_BLOCK = {"type": "object", "title": "Block", "properties": {"n": {"type": "number", "default": 1.0}}}
_SPELLED = {"type": "object", "properties": {"n": {"type": "number", "default": 1.0}}}
_NULL = {"type": "null"}
_TEXT = {"type": "string", "maxLength": 1_048_576}
NODES = [
    ("text is bounded", {"type": "string", "title": "Name"}, _TEXT),
    ("its own bound stays", {"type": "string", "maxLength": 9}, {"type": "string", "maxLength": 9}),
    ("choices bound themselves", {"type": "string", "enum": ["a"]}, {"type": "string", "enum": ["a"]}),
    ("a time has its form", {"type": "string", "format": "date-time"}, {"type": "string", "format": "date-time"}),
    ("null is a field left out", {"anyOf": [{"type": "boolean"}, _NULL], "default": None}, {"type": "boolean"}),
    ("a false default is one", {"type": "boolean", "default": False}, {"type": "boolean", "default": False}),
    ("a whole number has a format", {"type": "integer", "minimum": 1}, {"type": "integer", "minimum": 1, "format": "int64"}),
    (
        "exclusive bounds are flags",
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 2},
        {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 2, "exclusiveMaximum": True},
    ),
    ("a reference is what it names", {"$ref": "#/$defs/Block"}, _SPELLED),
    (
        "the field's description wins",
        {"anyOf": [{"$ref": "#/$defs/Block", "description": "a"}, _NULL], "description": "b"},
        {**_SPELLED, "description": "b"},
    ),
    (
        "a list is bounded",
        {"type": "array", "items": {"$ref": "#/$defs/Block"}},
        {"type": "array", "items": _SPELLED, "maxItems": 64, "x-kubernetes-list-type": "atomic"},
    ),
    (
        "its own length stays",
        {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        {"type": "array", "items": _TEXT, "maxItems": 3, "x-kubernetes-list-type": "atomic"},
    ),
    (
        "a mapping's values are resolved and its keys left alone",
        {"type": "object", "additionalProperties": {"$ref": "#/$defs/Block"}, "propertyNames": {"maxLength": 3}},
        {"type": "object", "additionalProperties": _SPELLED, "maxProperties": 64},
    ),
    (
        "what the API server may not look into is left alone",
        {"type": "object", "additionalProperties": True, "x-kubernetes-preserve-unknown-fields": True},
        {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
    ),
    (
        "a block that may be left out is spelled out",
        {"type": "object", "properties": {"b": {"$ref": "#/$defs/Block"}, "c": {"$ref": "#/$defs/Block"}}, "required": ["c"]},
        {"type": "object", "properties": {"b": {**_SPELLED, "default": {"n": 1.0}}, "c": _SPELLED}, "required": ["c"]},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("node", "expected"), [row[1:] for row in NODES], ids=[row[0] for row in NODES])
def test_a_node_of_a_schema_in_kubernetes_dialect(node: dict[str, Any], expected: dict[str, Any]):
    assert crd._structural(node, {"Block": _BLOCK}) == expected


def test_the_schema_is_structural():
    for path, node in _walk(_schema()):
        assert not {"$ref", "anyOf", "allOf", "const", "title"} & (set(node) - {"properties"}) or path.endswith(
            "properties"
        )


def test_every_spec_field_is_described_and_begins_with_its_name():
    spec = _schema()["properties"]["spec"]
    undescribed = []
    for path, node in _walk(spec):
        for name, prop in node.get("properties", {}).items() if isinstance(node.get("properties"), dict) else ():
            if not str(prop.get("description", "")).startswith(name):
                undescribed.append(f"{path}.{name}")
    assert undescribed == []


def test_every_kind_is_a_property_of_a_stage_and_one_rule_asks_for_exactly_one():
    stage = _schema()["properties"]["spec"]["properties"]["stages"]["items"]
    assert set(KINDS) <= set(stage["properties"])
    rule = stage["x-kubernetes-validations"][0]["rule"]
    assert all(f"has(self.{kind})" in rule for kind in KINDS)


def test_lists_are_bounded_and_typed():
    for path, node in _walk(_schema()):
        if node.get("type") == "array":
            assert node["maxItems"] >= 1, path
            assert node["x-kubernetes-list-type"] in ("map", "atomic"), path


def test_the_columns_and_names_are_what_people_type():
    definition = crd.run_crd()
    version = definition["spec"]["versions"][0]
    names = [c["name"] for c in version["additionalPrinterColumns"]]
    assert names == ["Stage", "Status", "Step", "Progress", "Loss", "Tok/s", "Restarts", "ETA", "Age"]
    assert definition["spec"]["names"]["shortNames"] == ["trun"]
    assert version["subresources"] == {"status": {}}


def test_the_status_is_not_filled_in_by_the_api_server():
    status = _schema()["properties"]["status"]
    assert all("default" not in node for path, node in _walk(status) if not path.endswith("properties"))


def test_the_files_are_yaml_without_aliases():
    for path, text in crd.files():
        assert "&id" not in text, path
        assert yaml.safe_load(text)["kind"] == "CustomResourceDefinition"


def test_the_command_writes_the_files_and_then_finds_nothing_to_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = [path for path, _ in crd.files()]
    assert crd.main(["--check"]) == 1
    assert [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()] == paths, "they are missing"
    for _ in range(2):
        assert crd.main([]) == 0
        assert {path: (tmp_path / path).read_text() for path in paths} == dict(crd.files())
        assert (crd.main(["--check"]), capsys.readouterr().out) == (0, "")
    (tmp_path / paths[1]).write_text("kind: CustomResourceDefinition")
    assert crd.main(["--check"]) == 1
    assert capsys.readouterr().out.startswith(f"{paths[1]}: ")
