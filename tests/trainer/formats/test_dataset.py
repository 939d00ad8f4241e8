"""From a data block to units: sources in order, validation held apart, a report of everything that was left out or cut."""

import json

import pytest

from headrace_api.run import Storage
from headrace_api.stages.data import Data
from headrace_trainer.errors import Stopped, UserError
from headrace_trainer.formats.chat import Encoder
from headrace_trainer.formats.dataset import Dataset, load_dataset
from headrace_trainer.formats.packs import PackOrder
from headrace_trainer.formats.preview import preview
from headrace_trainer.formats.records import PAIR_SHAPES, PROMPT_SHAPES, SFT_SHAPES
from trainer.formats.builders import chat, write_records


@pytest.fixture(scope="module")
def encoder(folders):
    return Encoder(folders["byte_level"], sequence_length=64)


def load(tmp_path, encoder, data, *, allowed=SFT_SHAPES, storage=None, name="out", **options):
    return load_dataset(
        Data.model_validate(data),
        name="sft.data",
        allowed=allowed,
        encoder=encoder,
        storage=storage or Storage(),
        folder=tmp_path / name,
        **options,
    )


def chats(path, first, count):
    return write_records(
        path, *({"messages": chat(f"What is {i}?", f"It is {i}")} for i in range(first, first + count))
    )


def texts_of(encoder, units):
    return [encoder.tokenizer.decode(d.tokens[d.mask]) for i in range(len(units)) for d in units[i]]


def test_sources_keep_their_order_and_become_shares(tmp_path, encoder):
    one, two = chats(tmp_path / "1.jsonl", 0, 3), chats(tmp_path / "2.jsonl", 10, 2)
    found = load(tmp_path, encoder, {"sources": [{"uri": str(two), "weight": 2}, {"uri": str(one)}]})
    assert texts_of(encoder, found.train) == [f"It is {i}<|im_end|>" for i in (10, 11, 0, 1, 2)]
    assert [(s.first, s.count, s.weight) for s in found.shares] == [(0, 2, 2.0), (2, 3, 1.0)]
    assert found.validation is None
    order = PackOrder(found.train.lengths, capacity=64, seed=1, shares=found.shares)
    assert sum(len(order.units(i)) for i in range(order.packs_per_epoch)) == 7


def test_a_fraction_is_held_back_by_content_wherever_a_record_stands(tmp_path, encoder):
    chats(tmp_path / "raw" / "a.jsonl", 0, 200)
    chats(tmp_path / "raw" / "b.jsonl", 0, 200)
    data = {"sources": [{"uri": str(tmp_path / "raw")}], "validation": {"fraction": 0.2}}
    found = load(tmp_path, encoder, data)
    train, held = texts_of(encoder, found.train), texts_of(encoder, found.validation)
    assert len(train) + len(held) == 400
    assert 40 < len(held) < 130
    assert not set(train) & set(held)
    source = found.report["sources"][0]
    assert (source["train"], source["validation"]) == (len(train), len(held))
    again = load(tmp_path, encoder, data, name="again")
    assert texts_of(encoder, again.validation) == held


def test_a_prompts_other_columns_stay_with_it(tmp_path, encoder):
    def prompts(name, answers):
        rows = ({"prompt": f"What is {i}?", "answer": answer} for i, answer in enumerate(answers))
        data = {"sources": [{"uri": str(write_records(tmp_path / f"{name}.jsonl", *rows))}]}
        return load(tmp_path, encoder, data, allowed=PROMPT_SHAPES, name=name)

    found = prompts("one", ["zero", {"deep": [1]}, None])
    assert [json.loads(found.train.note(i)) for i in range(3)] == [
        {"answer": "zero"},
        {"answer": {"deep": [1]}},
        {"answer": None},
    ]
    # Other answers to the same prompts are another training.
    assert prompts("other", ["null", {"deep": [1]}, None]).digest != found.digest
    assert prompts("same", ["zero", {"deep": [1]}, None]).digest == found.digest


def test_held_out_records_come_from_their_own_address(tmp_path, encoder):
    data = {
        "sources": [{"uri": str(chats(tmp_path / "a.jsonl", 0, 3))}],
        "validation": {"uri": str(chats(tmp_path / "held.jsonl", 50, 2))},
    }
    found = load(tmp_path, encoder, data)
    assert texts_of(encoder, found.validation) == ["It is 50<|im_end|>", "It is 51<|im_end|>"]
    assert len(found.train) == 3
    held = found.report["sources"][1]
    assert held["source"].startswith("sft.data.validation.uri: ")
    assert (held["train"], held["validation"]) == (0, 2)


def test_another_rank_opens_what_one_has_made(tmp_path, encoder):
    data = {
        "sources": [{"uri": str(chats(tmp_path / "a.jsonl", 0, 90)), "weight": 0.5}],
        "validation": {"fraction": 0.2},
    }
    made = load(tmp_path, encoder, data)
    made.save(tmp_path / "out")
    opened = Dataset.open(tmp_path / "out")
    assert opened.digest == made.digest
    assert (opened.report, opened.train.lengths.tolist()) == (made.report, made.train.lengths.tolist())
    assert [vars(s) for s in opened.shares] == [vars(s) for s in made.shares]
    assert len(opened.validation) == len(made.validation) > 0


def test_the_report_counts_what_was_bad_cut_dropped_and_left_out(tmp_path, encoder):
    raw = tmp_path / "raw"
    write_records(
        raw / "a.jsonl",
        {"messages": chat("What?", "That.")},
        "not json",
        {"messages": [{"role": "wizard", "content": "x"}, *chat("", "y")[1:]]},
        {"messages": chat("What?", "burns " * 200)},
        {"messages": chat("burns " * 200, "What?")},
    )
    (raw / "b.jsonl").write_bytes(b"")
    (raw / "README.md").write_text("about")
    found = load(tmp_path, encoder, {"sources": [{"uri": str(raw)}], "maxBadFraction": 0.4})
    (source,) = found.report["sources"]
    assert source["bad"] == {"notJson": 1, "template": 1}
    assert [place.split(": ")[0] for place in source["first"]] == [f"{raw}/a.jsonl:2", f"{raw}/a.jsonl:3"]
    assert (source["good"], source["train"], source["truncated"], source["dropped"]) == (3, 2, 2, 1)
    assert source["firstDropped"] == [f"{raw}/a.jsonl:5"]
    assert source["emptyFiles"] == [f"{raw}/b.jsonl"]
    assert source["filesLeftOut"] == ["README.md"]
    assert source["tokens"] == found.train.lengths.sum()
    assert found.report["trainedTokens"] == source["trainedTokens"] == found.train.num_trained
    assert found.report["unitTokens"]["max"] == 64
    json.dumps(found.report)


def test_turns_that_the_template_refuses_count_against_the_budget(tmp_path, encoder):
    good, bad = chat("What?", "That."), [{"role": "wizard", "content": "x"}, *chat("", "y")[1:]]
    path = write_records(tmp_path / "a.jsonl", *({"messages": m} for m in [good] * 8 + [bad] * 2))
    with pytest.raises(UserError) as caught:
        load(tmp_path, encoder, {"sources": [{"uri": str(path)}], "maxBadFraction": 0.1})
    assert (
        f"2 of 10 records (20.00%) cannot be used, and maxBadFraction allows 10.00%: template 2. First: {path}:9"
        in str(caught.value)
    )


def test_the_budget_is_each_sources_own(tmp_path, encoder):
    small = write_records(tmp_path / "small.jsonl", {"text": "The lamp"}, "bad")
    large = chats(tmp_path / "large.jsonl", 0, 500)
    with pytest.raises(UserError, match=r"sft.data.sources\[1\].uri: .*small.jsonl': 1 of 2 records"):
        load(tmp_path, encoder, {"sources": [{"uri": str(large)}, {"uri": str(small)}], "maxBadFraction": 0.01})


@pytest.mark.parametrize(
    ("records", "data", "expected"),
    [
        ([{"messages": chat("burns " * 200, "What?")}], {}, "none of 1 records has anything to train on within sequenceLength"),
        ([{"messages": chat("What?", "That.")}], {"validation": {"fraction": 1e-9}}, "holds none of 1 records back; raise it"),
        ([], {}, "no records, none of them usable"),
    ],
)  # fmt: skip
def test_data_that_leaves_nothing_is_an_error_of_the_user(tmp_path, encoder, records, data, expected):
    path = write_records(tmp_path / "a.jsonl", *records)
    with pytest.raises(UserError, match=expected):
        load(tmp_path, encoder, {"sources": [{"uri": str(path)}]} | data)


def test_a_fraction_that_holds_everything_back_is_an_error_of_the_user(tmp_path, encoder):
    for i in range(50):
        path = write_records(tmp_path / "a.jsonl", {"text": f"The lamp {i}"})
        try:
            load(tmp_path, encoder, {"sources": [{"uri": str(path)}], "validation": {"fraction": 0.5}}, name=f"out{i}")
        except UserError as error:
            if "holds every record back; lower it" in str(error):
                return
    raise AssertionError("of 50 records none was held back")


def test_a_request_to_stop_is_heard_between_records(tmp_path, encoder):
    path = chats(tmp_path / "a.jsonl", 0, 1000)
    with pytest.raises(Stopped):
        load(tmp_path, encoder, {"sources": [{"uri": str(path)}]}, stop_requested=lambda: True)


def test_pairs_are_read_from_s3(tmp_path, encoder, s3):
    client, storage = s3
    pairs = [{"prompt": f"{i}?", "chosen": f" {i}", "rejected": " no", "margin": i} for i in range(4)]
    client.upload_file(str(write_records(tmp_path / "a.jsonl", *pairs)), "bucket", "pairs/a.jsonl")
    found = load(tmp_path, encoder, {"sources": [{"uri": "s3://bucket/pairs"}]}, allowed=PAIR_SHAPES, storage=storage)
    assert [found.train[i][0].margin for i in range(4)] == [0.0, 1.0, 2.0, 3.0]
    assert [len(found.train[i]) for i in range(4)] == [2] * 4
    assert [*(tmp_path / "out" / "scratch").iterdir()] == []


def test_a_preview_marks_what_is_trained_on(tmp_path, encoder):
    found = load(tmp_path, encoder, {"sources": [{"uri": str(chats(tmp_path / "a.jsonl", 0, 100))}]})
    text = preview(found.train, encoder.tokenizer)
    assert text.count("### Example") == 10
    assert "What is 90?<|im_end|>\n<|im_start|>assistant\n⟦It is 90<|im_end|>⟧" in text
    assert "### Example 90: " in text


def test_a_preview_of_pairs_shows_both_sides(tmp_path, encoder):
    pairs = [{"prompt": "Two?", "chosen": " Two", "rejected": " no", "margin": 1.5}]
    data = {"sources": [{"uri": str(write_records(tmp_path / "a.jsonl", *pairs))}]}
    text = preview(load(tmp_path, encoder, data, allowed=PAIR_SHAPES).train, encoder.tokenizer)
    assert "### Example 0, chosen: " in text and "margin 1.5" in text
    assert "Two?⟦ Two<|endoftext|>⟧" in text and "Two?⟦ no<|endoftext|>⟧" in text


def test_a_preview_is_short_and_code_in_it_does_not_end_its_block(folders, tmp_path):
    long = Encoder(folders["byte_level"], sequence_length=8192)
    turns = [t for i in range(30) for t in chat(f"{i}", "````\nx\n````" if i == 0 else "burns " * 300)]
    path = write_records(tmp_path / "a.jsonl", {"messages": turns})
    text = preview(load(tmp_path, long, {"sources": [{"uri": str(path)}]}).train, long.tokenizer)
    assert len(text) < 8000
    assert "`````text\n" in text and text.rstrip().endswith("\n`````")
    assert "more parts ...]" in text and "characters ...]" in text


@pytest.mark.parametrize("kind", ["metaspace", "prepended"])
def test_a_preview_keeps_the_spaces_of_tokenizers_that_drop_the_first(folders, tmp_path, kind):
    other = Encoder(folders[kind], sequence_length=64)
    path = write_records(tmp_path / "a.jsonl", {"prompt": "The", "completion": " lamp burns"})
    text = preview(load(tmp_path, other, {"sources": [{"uri": str(path)}]}).train, other.tokenizer)
    assert "The⟦ lamp burns<|endoftext|>⟧" in text
