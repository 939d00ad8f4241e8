"""The operator's objects on a real API server: no unknown fields, and pods admitted at the restricted level."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from world import World

pytestmark = pytest.mark.slow

Json = dict[str, Any]

GOLDEN = [p for p in sorted(Path(__file__).with_name("golden").glob("*.yaml")) if not p.name.endswith(".in.yaml")]


def _read(golden: Path, *, namespace: str) -> list[Json]:
    text = golden.read_text().replace("namespace: team", f"namespace: {namespace}")
    return [obj for obj in yaml.safe_load_all(text) if "kind" in obj]  # the others are patches


def _pod(workload: Json) -> Json:
    """A pod as the workload's controller makes it."""
    template, meta = workload["spec"]["template"], workload["metadata"]
    named = {**template["metadata"], "name": meta["name"], "namespace": meta["namespace"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": named, "spec": template["spec"]}


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_what_is_built_is_taken_field_by_field(world: World, golden: Path) -> None:
    objects = _read(golden, namespace=world.namespace)
    account, workload = objects[:2]
    world.plane.apply({**account, "metadata": {**account["metadata"], "ownerReferences": []}})  # a pod needs it
    for obj in [*objects, _pod(workload)]:
        strictly = ("create", "--dry-run=server", "--validate=strict", "-o", "json", "-f", "-")
        if obj is not account:
            taken = json.loads(world.plane.kubectl(*strictly, stdin=json.dumps(obj)))
            assert taken["metadata"]["name"] == obj["metadata"]["name"]
