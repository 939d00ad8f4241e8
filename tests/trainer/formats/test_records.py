"""Records of every shape are read, and a bad one is named with its place and reason, counted, and never more."""

import bz2
import gzip
import json
import lzma
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace_api.run import Storage
from headrace_api.stages.data import RecordFormat
from headrace_trainer.errors import UserError
from headrace_trainer.formats.records import (
    KTO_SHAPES,
    PAIR_SHAPES,
    PROMPT_SHAPES,
    SFT_SHAPES,
    BadRecord,
    ChatRecord,
    CompletionRecord,
    PairRecord,
    PromptRecord,
    Reason,
    Tally,
    TextRecord,
    find_source,
    reading,
)
from headrace_trainer.formats.records import read_records as read
from manifests import seed_of_this_test
from trainer.formats.builders import chat, write_records

TEXT = {"text": "The lamp burns."}


def read_all(path, allowed=SFT_SHAPES, *, format=None, storage=None, tmp_path=None):
    storage = storage or Storage()
    source = find_source(str(path), storage, field="sft.data.sources[0].uri", format=format)
    return [*read(source, storage, allowed=allowed, scratch=tmp_path or path.parent)]


def read_one(tmp_path, record, allowed=SFT_SHAPES):
    (found,) = read_all(write_records(tmp_path / "a.jsonl", record), allowed)
    return found


QUESTION = [{"role": "user", "content": "Two?"}]
YES, NO = [{"role": "assistant", "content": "Yes"}], [{"role": "assistant", "content": "No"}]


@pytest.mark.parametrize(
    ("row", "allowed", "kind", "fields"),
    [
        (TEXT, SFT_SHAPES, TextRecord, {"text": "The lamp burns."}),
        ({"messages": QUESTION + YES}, SFT_SHAPES, ChatRecord, {"messages": QUESTION + YES, "tools": None}),
        ({"prompt": "Two?", "completion": " Yes"}, SFT_SHAPES, CompletionRecord, {"completion": " Yes", "label": None}),
        ({"prompt": QUESTION, "completion": YES}, SFT_SHAPES, CompletionRecord, {"prompt": QUESTION, "completion": YES}),
        ({"prompt": "Two?", "completion": " Yes", "label": True}, KTO_SHAPES, CompletionRecord, {"label": True}),
        ({"prompt": "Two?", "completion": " Yes", "label": 0}, KTO_SHAPES, CompletionRecord, {"label": False}),
        ({"prompt": "Two?", "chosen": " Yes", "rejected": " No"}, PAIR_SHAPES, PairRecord, {"prompt": "Two?", "chosen": " Yes"}),
        ({"prompt": QUESTION, "chosen": YES, "rejected": NO, "margin": 2}, PAIR_SHAPES, PairRecord, {"margin": 2.0}),
        ({"chosen": QUESTION + YES, "rejected": QUESTION + NO}, PAIR_SHAPES, PairRecord, {"prompt": QUESTION, "rejected": NO}),
        ({"chosen": "Q: Two? A: Yes", "rejected": "Q: Two? A: Yep"}, PAIR_SHAPES, PairRecord, {"prompt": "Q: Two? A:", "chosen": " Yes"}),
        ({"chosen": "Q: Yes", "rejected": "Q: Yes, two"}, PAIR_SHAPES, PairRecord, {"prompt": "Q:", "chosen": " Yes", "rejected": " Yes, two"}),
        # As UltraFeedback's binarized form has it: the sides hold the prompt too.
        ({"prompt": "Two?", "chosen": QUESTION + YES, "rejected": QUESTION + NO}, PAIR_SHAPES, PairRecord, {"prompt": QUESTION, "chosen": YES}),
        ({"prompt": QUESTION, "chosen": QUESTION + YES, "rejected": QUESTION + NO}, PAIR_SHAPES, PairRecord, {"prompt": QUESTION, "chosen": YES}),
        ({"prompt": "Two?", "answer": 4, "tools": None}, PROMPT_SHAPES, PromptRecord, {"prompt": "Two?", "others": {"answer": 4}}),
        ({"prompt": QUESTION}, PROMPT_SHAPES, PromptRecord, {"prompt": QUESTION, "others": {}}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("format", RecordFormat)
def test_every_shape_is_read_from_json_lines_and_parquet(tmp_path, row, allowed, kind, fields, format):
    path = tmp_path / f"a.{format}"
    if format is RecordFormat.JSONL:
        write_records(path, row)
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    (found,) = read_all(path, allowed)
    assert type(found) is kind, found
    assert {name: getattr(found, name) for name in fields} == fields
    assert str(found.place) == f"{path}:1"


CALLS = [{"id": "1", "type": "function", "function": {"name": "sum", "arguments": '{"a": 2}'}}]


def test_arguments_of_calls_become_objects_and_parts_of_content_one_text(tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2?"}]},
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    found = read_one(tmp_path, {"messages": messages, "tools": json.dumps([{"type": "function"}])})
    assert found.messages[0]["content"] == "What is 2?"
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 2}
    assert "content" not in found.messages[1]
    assert found.tools == [{"type": "function"}]


def test_keys_that_parquet_adds_to_other_rows_objects_are_left_out(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]}
        for call in (
            {"function": {"name": "f", "arguments": {"a": 1}}},
            {"function": {"name": "g", "arguments": {"b": 2}}},
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    calls = [record.messages[1]["tool_calls"][0]["function"] for record in read_all(tmp_path / "a.parquet")]
    assert calls == [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": 2}}]


@pytest.mark.parametrize(
    ("line", "allowed", "reason", "detail"),
    [
        ('{"text": "no end', SFT_SHAPES, Reason.NOT_JSON, "at column"),
        ('{"text": NaN}', SFT_SHAPES, Reason.NOT_JSON, "at column 10"),
        ('{"text": 1e999}', SFT_SHAPES, Reason.NOT_JSON, "infinity"),
        ('{"text": "\\ud800 alone"}', SFT_SHAPES, Reason.NOT_JSON, "surrogate"),
        (b'{"text": "gr\xfc\xdfe"}', SFT_SHAPES, Reason.NOT_UTF8, "UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', SFT_SHAPES, Reason.NOT_UTF8, "surrogates"),
        ('["text"]', SFT_SHAPES, Reason.NOT_JSON, "a JSON list, not an object"),
        ("[" * 5000, SFT_SHAPES, Reason.NOT_JSON, ""),
        ('{"test": "x"}', SFT_SHAPES, Reason.MISSING_FIELD, "no 'text'; there is test"),
        ('{"text": null}', SFT_SHAPES, Reason.MISSING_FIELD, "no 'text'; there is nothing"),
        ('{"text": 7}', SFT_SHAPES, Reason.WRONG_TYPE, "'text' holds a number, not text"),
        ('{"text": ["a"]}', SFT_SHAPES, Reason.WRONG_TYPE, "'text' holds a list"),
        ('{"text": " \\n"}', SFT_SHAPES, Reason.EMPTY, "'text' is empty"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, allowed, reason, detail):
    path = write_records(tmp_path / "a.jsonl", TEXT, "", line, TEXT)
    first, bad, last = read_all(path, allowed)
    assert (first.place.number, last.place.number) == (1, 4)
    assert (str(bad.place), bad.reason) == (f"{path}:3", reason)
    assert detail in bad.detail


MESSAGES = {"messages": QUESTION + YES}
PROMPTED = {"prompt": "Two?", "completion": " Yes"}
PAIR = {"prompt": "Two?", "chosen": " Yes", "rejected": " No"}
LABELLED = PROMPTED | {"label": True}
TURN_PAIR = {"prompt": QUESTION, "chosen": YES, "rejected": NO}


@pytest.mark.parametrize(
    ("good", "change", "allowed", "reason", "detail"),
    [
        (MESSAGES, {"messages": []}, SFT_SHAPES, Reason.EMPTY, "'messages' is an empty list"),
        (MESSAGES, {"messages": "Hi"}, SFT_SHAPES, Reason.WRONG_TYPE, "'messages' holds text, not a list of turns"),
        (MESSAGES, {"messages": ["Hi"]}, SFT_SHAPES, Reason.BAD_TURN, "messages[0] holds text, not a turn"),
        (MESSAGES, {"messages": [{"from": "human", "value": "x"}]}, SFT_SHAPES, Reason.BAD_TURN, "no role; there is from, value"),
        (MESSAGES, {"messages": [{"role": 7, "content": "x"}]}, SFT_SHAPES, Reason.BAD_TURN, "no role"),
        (MESSAGES, {"messages": [{"role": "user"}]}, SFT_SHAPES, Reason.BAD_TURN, "messages[0] has no content"),
        (MESSAGES, {"messages": [{"role": "user", "content": {"a": 1}}]}, SFT_SHAPES, Reason.BAD_TURN, "holds an object"),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, SFT_SHAPES, Reason.BAD_TURN, "parts that are not text"),
        (MESSAGES, {"messages": [{"role": "system", "content": "Be brief."}]}, SFT_SHAPES, Reason.NO_ASSISTANT, "turns of system only"),
        (MESSAGES, {"messages": QUESTION}, SFT_SHAPES, Reason.NO_ASSISTANT, "turns of user only"),
        (MESSAGES, {"messages": chat("Hi", " ")}, SFT_SHAPES, Reason.EMPTY, "messages[1] is an empty turn"),
        (MESSAGES, {"messages": [*QUESTION, {"role": "assistant", "tool_calls": [{}]}]}, SFT_SHAPES, Reason.BAD_TURN, "names no function"),
        (MESSAGES, {"messages": [*QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, SFT_SHAPES, Reason.NOT_JSON, "arguments"),
        (MESSAGES, {"tools": "[{"}, SFT_SHAPES, Reason.NOT_JSON, "tools"),
        (MESSAGES, {"tools": {"a": 1}}, SFT_SHAPES, Reason.WRONG_TYPE, "'tools' is not a list of objects"),
        (PROMPTED, {"completion": ""}, SFT_SHAPES, Reason.EMPTY, "'completion' is empty"),
        (PROMPTED, {"completion": YES}, SFT_SHAPES, Reason.WRONG_TYPE, "'prompt' holds text and 'completion' a list of turns"),
        (PROMPTED, {"completion": QUESTION, "prompt": QUESTION}, SFT_SHAPES, Reason.BAD_TURN, "begins with a turn of 'user'"),
        (PROMPTED, {"completion": YES, "prompt": YES}, SFT_SHAPES, Reason.BAD_TURN, "ends with a turn of the assistant"),
        (LABELLED, {"label": "yes"}, KTO_SHAPES, Reason.WRONG_TYPE, "'label' holds text, neither true nor false"),
        (LABELLED, {"label": 2}, KTO_SHAPES, Reason.WRONG_TYPE, "'label' holds a number"),
        (LABELLED, {"label": None}, KTO_SHAPES, Reason.MISSING_FIELD, "no 'label'"),
        (PAIR, {"rejected": " Yes"}, PAIR_SHAPES, Reason.EQUAL_SIDES, "are the same"),
        (PAIR, {"rejected": ""}, PAIR_SHAPES, Reason.EMPTY, "'rejected' is empty"),
        (PAIR, {"rejected": NO}, PAIR_SHAPES, Reason.WRONG_TYPE, "'chosen' holds text and 'rejected' a list of turns"),
        (PAIR, {"margin": "big"}, PAIR_SHAPES, Reason.WRONG_TYPE, "'margin' holds text"),
        (PAIR, {"margin": True}, PAIR_SHAPES, Reason.WRONG_TYPE, "'margin' holds true or false"),
        (TURN_PAIR, {"rejected": QUESTION}, PAIR_SHAPES, Reason.BAD_TURN, "'rejected' begins with a turn of 'user'"),
        (TURN_PAIR, {"rejected": []}, PAIR_SHAPES, Reason.EMPTY, "'rejected' is an empty list"),
    ],
)  # fmt: skip
def test_a_record_of_the_wrong_form_is_named_with_what_is_wrong(tmp_path, good, change, allowed, reason, detail):
    path = write_records(tmp_path / "a.jsonl", good, good | change)
    _, bad = read_all(path, allowed)
    assert (bad.place.number, bad.reason) == (2, reason), bad
    assert detail in bad.detail


def test_pairs_of_turns_without_a_common_beginning_have_no_prompt(tmp_path):
    bad = read_one(tmp_path, {"chosen": YES, "rejected": NO}, PAIR_SHAPES)
    assert (bad.reason, "no common turns" in bad.detail) == (Reason.BAD_TURN, True)


def test_a_margin_that_is_not_a_number_is_named_in_parquet(tmp_path):
    pq.write_table(
        pa.Table.from_pylist([PAIR | {"margin": 1.0}, PAIR | {"margin": float("nan")}]), tmp_path / "a.parquet"
    )
    good, bad = read_all(tmp_path / "a.parquet", PAIR_SHAPES)
    assert (good.margin, bad.reason, bad.place.number) == (1.0, Reason.NOT_FINITE, 2)


def test_the_first_record_decides_the_shape_and_the_others_must_have_it(tmp_path):
    path = write_records(tmp_path / "a.jsonl", "not json", MESSAGES, TEXT, TEXT | MESSAGES)
    found = read_all(path)
    assert [getattr(f, "reason", None) for f in found] == [Reason.NOT_JSON, None, Reason.MISSING_FIELD, None]
    assert isinstance(found[3], ChatRecord)


def test_the_most_telling_shape_that_the_stage_takes_is_chosen(tmp_path):
    row = PAIR | PROMPTED | MESSAGES | TEXT | {"label": True}
    kinds = {
        shapes: type(read_one(tmp_path, row, shapes)) for shapes in (SFT_SHAPES, PAIR_SHAPES, KTO_SHAPES, PROMPT_SHAPES)
    }
    assert [*kinds.values()] == [CompletionRecord, PairRecord, CompletionRecord, PromptRecord]


@pytest.mark.parametrize("format", RecordFormat)
def test_a_first_record_of_no_shape_that_the_stage_takes_is_an_error_that_says_which_it_takes(tmp_path, format):
    path, row = tmp_path / f"a.{format}", {"prompt": "x", "output": "y"}
    if format is RecordFormat.JSONL:
        write_records(path, row)
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(UserError) as caught:
        read_all(path)
    assert str(caught.value) == (
        f"{path}:1: the first record has output, prompt; this stage takes prompt, completion; or messages; or text: "
        "rename the fields"
    )


def test_columns_that_no_shape_needs_are_not_read_from_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"] * 1000, "embedding": pa.array([b"\0"] * 1000)}), path, use_dictionary=False)
    column = pq.read_metadata(path).row_group(0).column(1)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 8] = bytes(8)
    path.write_bytes(content)
    assert len([r for r in read_all(path) if isinstance(r, TextRecord)]) == 1000


COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_lines_are_read_and_a_file_cut_short_is_an_error_of_the_user(tmp_path, suffix):
    lines = b"".join(json.dumps({"text": f"entry {random.Random(i).random()}"}).encode() + b"\n" for i in range(500))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix](lines))
    assert len(read_all(path)) == 500
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="truncated or corrupt near byte"):
        read_all(path)


def test_a_parquet_file_with_a_bad_page_loses_the_rest_of_its_row_group_and_counts_it(tmp_path):
    path = tmp_path / "a.parquet"
    rows = pa.Table.from_pylist([{"text": f"entry {i} {random.Random(i).random()}"} for i in range(3000)])
    pq.write_table(rows, path, row_group_size=1000, compression="zstd", use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    found = read_all(path)
    (bad,) = [f for f in found if isinstance(f, BadRecord)]
    assert (bad.reason, bad.records + len(found) - 1) == (Reason.UNREADABLE, 3000)
    assert 1001 <= bad.place.number <= 2000
    assert found[-1].place.number == 3000


def test_a_parquet_text_that_is_not_utf8_costs_its_own_row(tmp_path):
    path = tmp_path / "a.parquet"
    values = pa.array([b"fine", b"gr\xfc\xdfe", b"fine too"], pa.binary())
    text = pa.StringArray.from_buffers(3, values.buffers()[1], values.buffers()[2])
    pq.write_table(pa.table({"text": text}), path)
    found = read_all(path)
    assert [getattr(f, "reason", None) for f in found] == [None, Reason.NOT_UTF8, None]


@pytest.mark.parametrize("damage", [lambda d: d[:-30], lambda d: b"no parquet", lambda d: b""])
def test_a_damaged_parquet_file_is_an_error_of_the_user(tmp_path, damage):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([TEXT]), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_all(path)


def test_whatever_bytes_change_in_a_file_the_answer_is_records_or_an_error_of_the_user(tmp_path):
    rng = random.Random(seed_of_this_test())
    rows = [{"messages": chat(f"What is {i}?", f"It is {i}"), "tools": [{"n": i}]} for i in range(300)]
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        path = tmp_path / name
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
        else:
            lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(COMPRESSORS.get(path.suffix, bytes)(lines))
        whole = path.read_bytes()
        for _ in range(60):
            content = bytearray(whole)
            for _ in range(rng.choice([1, 1, 8])):
                content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
            try:
                read_all(path)
            except UserError as error:
                assert str(path) in str(error)


def test_a_line_that_is_too_long_is_passed_over_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1000)
    path = write_records(tmp_path / "a.jsonl", TEXT, {"text": "x" * 5000}, TEXT, {"text": "y" * 2000})
    found = read_all(path)
    assert [getattr(f, "reason", None) for f in found] == [None, Reason.TOO_LARGE, None, Reason.TOO_LARGE]
    assert [f.place.number for f in found] == [1, 2, 3, 4]


def test_files_are_read_by_name_and_others_are_left_out(tmp_path):
    for name in ("b.jsonl", "a.parquet", "sub/c.jsonl", "README.md", "_SUCCESS", ".hidden.jsonl", "empty.jsonl"):
        path = tmp_path / "raw" / name
        if name.endswith(".parquet"):
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist([{"text": name}]), path)
        else:
            write_records(path, *([] if name.startswith("empty") else [{"text": name}]))
    found = read_all(tmp_path / "raw", tmp_path=tmp_path)
    assert [record.text for record in found] == ["a.parquet", "b.jsonl", "sub/c.jsonl"]
    source = find_source(str(tmp_path / "raw"), Storage(), field="f")
    assert source.left_out == ("README.md",)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("raw/*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("raw/[bc].jsonl", ["b.jsonl"]),
        ("raw/[!b].jsonl", ["a.jsonl"]),
        ("raw/?.jsonl", ["a.jsonl", "b.jsonl"]),
        ("raw/**/*.jsonl", ["a.jsonl", "b.jsonl", "d/c.jsonl"]),
        ("raw/**", ["a.jsonl", "b.jsonl", "d/c.jsonl"]),
        ("raw/*/c.jsonl", ["d/c.jsonl"]),
        ("r*/a.jsonl", ["raw/a.jsonl"]),
    ],
)
@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_pattern_names_the_files_that_match(tmp_path, s3, pattern, expected, where):
    client, storage = s3
    for name in ("raw/a.jsonl", "raw/b.jsonl", "raw/d/c.jsonl", "raw2/a.txt"):
        path = write_records(tmp_path / "root" / name, {"text": name})
        client.upload_file(str(path), "bucket", name)
    root = str(tmp_path / "root") if where == "folder" else "s3://bucket"
    source = find_source(f"{root}/{pattern}", storage, field="f")
    assert [file.key for file, _ in source.files] == expected
    assert len([*read(source, storage, allowed=SFT_SHAPES, scratch=tmp_path)]) == len(expected)


def test_a_name_that_looks_like_a_pattern_is_taken_as_it_is_where_it_is_there(tmp_path):
    write_records(tmp_path / "a[1].jsonl", TEXT)
    write_records(tmp_path / "a1.jsonl", TEXT)
    source = find_source(str(tmp_path / "a[1].jsonl"), Storage(), field="f")
    assert [file.key for file, _ in source.files] == ["a[1].jsonl"]


@pytest.mark.parametrize("name", ["none.jsonl", "none/*.jsonl", "*.none", "[.jsonl"])
def test_a_source_that_is_not_there_is_named_by_its_field(tmp_path, name):
    write_records(tmp_path / "a.jsonl", TEXT)
    with pytest.raises(UserError, match=r"sft.data.sources\[0\].uri: .*no file, and no folder with files"):
        read_all(tmp_path / name)


def test_a_file_whose_name_says_nothing_needs_a_format(tmp_path):
    path = write_records(tmp_path / "a.txt", TEXT)
    with pytest.raises(UserError, match="whose name does not say how it is read"):
        read_all(path)
    assert read_all(path, format=RecordFormat.JSONL)[0].text == TEXT["text"]


def counted(bad, good):
    tally = Tally(name="sft.data.sources[0].uri: 'a'")
    records = read_bad(bad)
    assert len([*tally.good_ones([*records, *range(good)])]) == good
    return tally


def read_bad(count):
    from headrace_trainer.formats.records import Place

    return [
        BadRecord(place=Place(file="a.jsonl", number=i + 1), reason=Reason.EMPTY, detail="'text' is empty")
        for i in range(count)
    ]


def test_a_budget_of_bad_records_is_kept_exactly():
    counted(1, 999).check(max_bad_fraction=0.001)
    with pytest.raises(UserError) as caught:
        counted(2, 1997).check(max_bad_fraction=0.001)
    message = str(caught.value)
    assert message.startswith(
        "sft.data.sources[0].uri: 'a': 2 of 1,999 records (0.10%) cannot be used, and maxBadFraction"
    )
    assert "empty 2. First: a.jsonl:1: empty: 'text' is empty; a.jsonl:2" in message
    assert message.endswith("empty: fill in or remove the record; or raise maxBadFraction")


def test_records_that_are_lost_together_count_each():
    tally = counted(0, 100)
    tally.add(BadRecord(place=read_bad(1)[0].place, reason=Reason.UNREADABLE, detail="x", records=50))
    with pytest.raises(UserError, match="50 of 150 records"):
        tally.check(max_bad_fraction=0.3)
    tally.check(max_bad_fraction=0.34)
    assert tally.as_json()["bad"] == {"unreadable": 50}


@pytest.mark.parametrize(
    ("bad", "said"), [(0, "no records, none of them usable"), (3, "3 records, none of them usable")]
)
def test_a_source_without_usable_records_is_an_error_whatever_the_budget(bad, said):
    with pytest.raises(UserError, match=said):
        counted(bad, 0).check(max_bad_fraction=1)


def test_the_first_places_are_kept_and_no_more():
    tally = counted(10_000, 1)
    assert len(tally.first) == 5
