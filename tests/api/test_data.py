"""The data block: what it accepts, refuses and means, and that the API server is told the same."""

import pytest
from pydantic import ValidationError

from headrace_api import crd
from headrace_api.stages.data import Data, RecordFormat, Records, cel_sources_absolute, cel_validation_absolute
from headrace_api.storage import cel_is_absolute

SOURCES = [{"uri": "s3://bucket/chat"}]


def schema():
    raw = Data.model_json_schema(by_alias=True)
    return crd._structural(raw, raw["$defs"])


def test_a_source_alone_has_the_stated_defaults():
    data = Data.model_validate({"sources": [{"uri": "chat.jsonl"}]})
    assert (data.sources[0].weight, data.sources[0].format) == (1.0, None)
    assert (data.max_bad_fraction, data.validation) == (0.001, None)


def test_every_field_is_read():
    data = Data.model_validate(
        {
            "sources": [{"uri": "a/*.jsonl.zst", "weight": 0.5}, {"uri": "/b", "format": "parquet"}],
            "maxBadFraction": 0,
            "validation": {"uri": "held.jsonl", "format": "jsonl"},
        }
    )
    assert data.sources[1].format is RecordFormat.PARQUET
    assert data.validation is not None
    assert (data.validation.uri, data.validation.format) == ("held.jsonl", RecordFormat.JSONL)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"sources": SOURCES * 65}, "sources"),
        ({"sources": [{"uri": ""}]}, "uri"),
        ({"sources": [{"uri": "https://host/a.jsonl"}]}, "only S3 and directories can be read"),
        ({"sources": [{"uri": "a", "weight": 0}]}, "weight"),
        ({"sources": [{"uri": "a", "weight": 101}]}, "weight"),
        ({"sources": [{"uri": "a", "weight": float("nan")}]}, "weight"),
        ({"sources": [{"uri": "a", "format": "csv"}]}, "format"),
        ({"sources": SOURCES, "maxBadFraction": -0.1}, "maxBadFraction"),
        ({"sources": SOURCES, "maxBadFraction": 1.1}, "maxBadFraction"),
        ({"sources": SOURCES, "validation": {}}, "uri: None: set either uri, to read held-out records, or fraction"),
        ({"sources": SOURCES, "validation": {"uri": "a", "fraction": 0.1}}, "uri: 'a': set either uri"),
        ({"sources": SOURCES, "validation": {"fraction": 0}}, "fraction"),
        ({"sources": SOURCES, "validation": {"fraction": 0.6}}, "fraction"),
        (
            {"sources": SOURCES, "validation": {"fraction": 0.1, "format": "jsonl"}},
            "format: 'jsonl': is of the files that uri names",
        ),
        ({"sources": SOURCES, "shuffle": True}, "shuffle"),
    ],
)
def test_a_bad_block_is_refused_by_its_field(block, expected):
    with pytest.raises(ValidationError) as caught:
        Data.model_validate(block)
    assert expected in str(caught.value)


def test_only_a_stage_that_may_read_an_earlier_ones_records_may_have_no_sources():
    assert Data.model_validate({}).sources == []
    with pytest.raises(ValidationError, match="sources"):
        Records.model_validate({"sources": []})


def test_the_api_server_is_told_every_bound_and_dependency():
    fields = schema()["properties"]
    source = fields["sources"]["items"]["properties"]
    assert (source["weight"]["minimum"], source["weight"]["exclusiveMinimum"], source["weight"]["maximum"]) == (
        0,
        True,
        100,
    )
    assert source["format"]["enum"] == ["jsonl", "parquet"]
    assert (fields["maxBadFraction"]["minimum"], fields["maxBadFraction"]["maximum"]) == (0, 1)
    rules = [r["rule"] for r in fields["validation"]["x-kubernetes-validations"]]
    assert rules == ["has(self.uri) != has(self.fraction)", "has(self.uri) || !has(self.format)"]
    assert "default" not in fields["validation"]


def test_every_field_is_described_and_begins_with_its_name():
    def check(node):
        for name, field in node.get("properties", {}).items():
            assert field["description"].startswith(name), name
            check(field)
            check(field.get("items", {}))

    check(schema())


def test_the_rule_for_relative_addresses_looks_at_sources_and_validation():
    absolute = cel_is_absolute("x.uri")
    assert cel_sources_absolute("s.sft.data") == f"!has(s.sft.data.sources) || s.sft.data.sources.all(x, {absolute})"
    held_out = "s.sft.data.validation.uri"
    asks = "!has(s.sft.data.validation) || !has(s.sft.data.validation.uri)"
    assert cel_validation_absolute("s.sft.data") == f"{asks} || {cel_is_absolute(held_out)}"
