"""Merging a runtime's pod template over the defaults."""

from typing import Any

import pytest

from headrace_operator.body.build.merge import merge

CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("dicts merge", {"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}, {"a": {"x": 1, "y": 3}}),
    (
        "named things merge by name and keep their order",
        {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]},
        {"env": [{"name": "C", "value": "3"}, {"name": "A", "value": "4"}]},
        {"env": [{"name": "A", "value": "4"}, {"name": "B", "value": "2"}, {"name": "C", "value": "3"}]},
    ),
    (
        "volume mounts merge by path",
        {"volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]},
        {"volumeMounts": [{"name": "fast", "mountPath": "/tmp"}, {"name": "tmp", "mountPath": "/x"}]},
        {"volumeMounts": [{"name": "fast", "mountPath": "/tmp"}, {"name": "tmp", "mountPath": "/x"}]},
    ),
    (
        "a volume has one source",
        {"volumes": [{"name": "tmp", "emptyDir": {"medium": "Memory"}}]},
        {"volumes": [{"name": "tmp", "persistentVolumeClaim": {"claimName": "scratch"}}]},
        {"volumes": [{"name": "tmp", "persistentVolumeClaim": {"claimName": "scratch"}}]},
    ),
    (
        "a variable has one source",
        {"env": [{"name": "A", "value": "1"}]},
        {"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}]},
        {"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}]},
    ),
    (
        "the same source merges",
        {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]},
        {"volumes": [{"name": "shm", "emptyDir": {"sizeLimit": "8Gi"}}]},
        {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}]},
    ),
    (
        "tolerations add up, once each",
        {"tolerations": [{"key": "a"}]},
        {"tolerations": [{"key": "a"}, {"key": "b"}]},
        {"tolerations": [{"key": "a"}, {"key": "b"}]},
    ),
    ("a block is replaced by what is none", {"a": {"x": 1}}, {"a": "y"}, {"a": "y"}),
    ("what is no block is replaced by one", {"a": "y"}, {"a": {"x": 1}}, {"a": {"x": 1}}),
    ("a list is replaced by what is none", {"env": [{"name": "A"}]}, {"env": None}, {"env": None}),
    ("what is no list is replaced by one", {"env": "none"}, {"env": [{"name": "A"}]}, {"env": [{"name": "A"}]}),
    ("other lists are replaced", {"args": ["a", "b"]}, {"args": ["c"]}, {"args": ["c"]}),
    ("lists of nameless dicts are replaced", {"terms": [{"x": 1}]}, {"terms": [{"y": 2}]}, {"terms": [{"y": 2}]}),
]


@pytest.mark.parametrize(("under", "over", "merged"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_merge(under: dict[str, Any], over: dict[str, Any], merged: dict[str, Any]) -> None:
    before = repr(under), repr(over)
    assert merge(under, over) == merged
    assert (repr(under), repr(over)) == before, "the pieces are not changed"
