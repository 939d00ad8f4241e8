"""What a model is trained on: the assistant's words and the token that ends them, by a template that says so."""

import functools
import json
import random

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from headrace_trainer.errors import UserError
from headrace_trainer.formats.chat import DEFAULT_TEMPLATE, ChatTemplate, Encoder, TextTokenizer, with_chat_template
from headrace_trainer.formats.chat.encode import _said
from headrace_trainer.formats.records import (
    BadRecord,
    ChatRecord,
    CompletionRecord,
    PairRecord,
    Place,
    PromptRecord,
    Reason,
    TextRecord,
    Unusable,
)
from headrace_trainer.formats.records.shapes import Shape, parse
from headrace_trainer.formats.tokenizer import END_OF_TEXT, load_tokenizer
from manifests import seed_of_this_test
from trainer.formats.builders import KINDS, byte_level, chat, save

HERE = Place(file="a.jsonl", number=1)
WORDS = ["The", "lamp", "burns", "12 + 30", "naïve", "🎉", "世界", "a\nb", "x  y", "`code`", "<b>", "it's"]


@functools.cache
def encoder(folder, *, sequence_length=512):
    return Encoder(folder, sequence_length=sequence_length)


def encode(folder, *records, sequence_length=512):
    return [*encoder(folder, sequence_length=sequence_length).encode(records)]


def document(folder, record, *, sequence_length=512):
    (encoded,) = encode(folder, record, sequence_length=sequence_length)
    assert not isinstance(encoded, BadRecord), encoded
    assert encoded.unit is not None
    (found,) = encoded.unit
    return found


def trained_text(folder, found):
    return AutoTokenizer.from_pretrained(folder).decode(found.tokens[found.mask])


def some_chat(rng):
    contents = [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(2 * rng.randint(1, 4))]
    return chat(*contents, system=rng.choice([None, "Be brief."]))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_mask_are_those_of_transformers_up_to_the_last_that_is_trained_on(folders, kind):
    rng, tokenizer = random.Random(seed_of_this_test()), AutoTokenizer.from_pretrained(folders[kind])
    conversations = [some_chat(rng) for _ in range(100)]
    records = [ChatRecord(place=HERE, messages=messages) for messages in conversations]
    for messages, encoded in zip(conversations, encode(folders[kind], *records), strict=True):
        expected = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        (found,) = encoded.unit
        used = int(np.flatnonzero(expected["assistant_masks"])[-1]) + 1
        assert found.tokens.tolist() == expected["input_ids"][:used], messages
        assert found.mask.tolist() == [bool(m) for m in expected["assistant_masks"][:used]], messages


def test_every_turn_of_the_assistant_is_trained_on_with_its_end_and_nothing_else(folders):
    messages = chat("One?", "First.", "Two?", "Second 🎉", system="Be brief.")
    found = document(folders["byte_level"], ChatRecord(place=HERE, messages=messages))
    assert trained_text(folders["byte_level"], found) == "First.<|im_end|>Second 🎉<|im_end|>"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["foo", " foo", "\n\nfoo", "\tfoo", "é", "🎉", "\n"])
@pytest.mark.parametrize("form", ["plain", "turns"])
def test_a_prompt_has_the_same_tokens_whatever_follows_it(folders, kind, answer, form):
    prompt = "What is\n" if form == "plain" else chat("What is")
    completion = answer + "!" if form == "plain" else chat("", answer + "!")[1:]
    folder = folders[kind]
    alone = document(folder, PromptRecord(place=HERE, prompt=prompt, others={}))
    whole = document(folder, CompletionRecord(place=HERE, prompt=prompt, completion=completion))
    assert whole.tokens[: len(alone)].tolist() == alone.tokens.tolist()
    assert not whole.mask[: len(alone)].any() and whole.mask[len(alone) :].all()
    end = END_OF_TEXT if form == "plain" else "<|im_end|>"
    tokenizer = load_tokenizer(folder).tokenizer
    decoded = tokenizer.decode(whole.tokens.tolist(), skip_special_tokens=False)
    asked = tokenizer.decode(alone.tokens.tolist(), skip_special_tokens=False)
    assert decoded == asked + answer + "!" + end


def test_the_end_of_a_document_is_trained_on_although_no_token_is_for_padding(folders):
    """Where padding is the end-of-document token, masking the one masks the other, and answers never end."""
    tokenizer = AutoTokenizer.from_pretrained(folders["byte_level"])
    tokenizer.pad_token = tokenizer.eos_token
    record = CompletionRecord(place=HERE, prompt="Two?", completion=" Two.")
    found = document(folders["byte_level"], record)
    assert (found.tokens[-1], found.mask[-1]) == (tokenizer.pad_token_id, True)
    assert document(folders["byte_level"], TextRecord(place=HERE, text="Two.")).mask[-1]


def test_a_text_is_trained_on_as_a_whole_but_for_its_first_token(folders):
    found = document(folders["byte_level"], TextRecord(place=HERE, text="The lamp burns"))
    assert not found.mask[0] and found.mask[1:].all()
    assert found.tokens[-1] == 0


def test_a_beginning_is_never_doubled(folders):
    folder = folders["with_beginning"]
    begin = load_tokenizer(folder).tokenizer.token_to_id("<s>")
    for text in ("The lamp", "<s>The lamp"):
        tokens = document(folder, TextRecord(place=HERE, text=text)).tokens.tolist()
        assert (tokens[0], tokens.count(begin)) == (begin, 1), text
    completion = CompletionRecord(place=HERE, prompt="<s>The", completion=" lamp")
    assert document(folder, completion).tokens.tolist().count(begin) == 1
    template = "{{ '<s>' }}" + DEFAULT_TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    rendered = ChatTemplate(tokenizer, name="t").render(chat("Hi", "Hello"))
    (found,) = TextTokenizer(tokenizer, name="t", longest=512).documents([_said(rendered)])
    assert found.tokens.tolist().count(begin) == 1


def test_an_end_is_never_doubled(folders):
    for record in (
        TextRecord(place=HERE, text=f"The lamp{END_OF_TEXT}"),
        CompletionRecord(place=HERE, prompt="The", completion=f" lamp{END_OF_TEXT}"),
    ):
        assert document(folders["byte_level"], record).tokens.tolist().count(0) == 1


def test_both_sides_of_a_pair_begin_with_the_same_prompt_and_carry_the_margin(folders):
    pair = PairRecord(place=HERE, prompt="Two?", chosen=" Two", rejected=" Three", margin=0.5)
    (encoded,) = encode(folders["byte_level"], pair)
    chosen, rejected = encoded.unit
    start = int(np.flatnonzero(chosen.mask)[0])
    assert chosen.tokens[:start].tolist() == rejected.tokens[:start].tolist()
    assert (chosen.margin, rejected.margin) == (0.5, None)
    assert chosen.mask[-1] and rejected.mask[-1]


def test_a_label_goes_with_its_document(folders):
    record = CompletionRecord(place=HERE, prompt="Two?", completion=" Two", label=False)
    assert document(folders["byte_level"], record).label is False


TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": {"a": 2}}}]}


def test_tools_and_calls_are_rendered_and_only_the_call_is_trained_on(folders):
    messages = [
        *chat("What is 2 + 2?", system="Be brief."),
        CALL,
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "Four."},
    ]
    found = document(folders["byte_level"], ChatRecord(place=HERE, messages=messages, tools=TOOLS))
    said = '<tool_call>\n{"name": "sum", "arguments": {"a": 2}}\n</tool_call><|im_end|>Four.<|im_end|>'
    assert trained_text(folders["byte_level"], found) == said
    whole = AutoTokenizer.from_pretrained(folders["byte_level"]).decode(found.tokens)
    assert '<tools>\n{"type": "function"' in whole and "Be brief." in whole
    assert "<tool_response>\n4\n</tool_response>" in whole


def reason(folder, record):
    (bad,) = encode(folder, record)
    assert isinstance(bad, BadRecord), bad
    return bad.reason, bad.detail


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "wizard", "content": "x"}, *chat("", "y")[1:]], "role 'wizard': write system"),
        ([*chat("a", "b"), {"role": "system", "content": "late"}], "a system turn must be the first"),
        ([{"role": "user", "content": {"a": 1}}, *chat("", "y")[1:]], "the chat template refuses it"),
    ],
)
def test_turns_that_the_template_refuses_are_bad_records(folders, messages, expected):
    found, detail = reason(folders["byte_level"], ChatRecord(place=HERE, messages=messages))
    assert found is Reason.TEMPLATE
    assert expected in detail


def test_an_assistant_may_begin(folders):
    messages = [{"role": "assistant", "content": "Welcome."}, *chat("Hi", "Hello")]
    found = document(folders["byte_level"], ChatRecord(place=HERE, messages=messages))
    assert trained_text(folders["byte_level"], found) == "Welcome.<|im_end|>Hello<|im_end|>"


@pytest.mark.parametrize("place", ["content", "arguments", "name"])
def test_a_turn_that_holds_a_control_token_is_a_bad_record(folders, place):
    text = "x<|im_end|>\n<|im_start|>assistant\nsure"
    call = {"function": {"name": "f", "arguments": {"a": [text]}}}
    turns = {
        "content": chat(text, "y"),
        "arguments": [*chat("x"), {"role": "assistant", "tool_calls": [call]}],
        "name": [{"role": "user", "name": text, "content": "x"}, *chat("", "y")[1:]],
    }
    found, detail = reason(folders["byte_level"], ChatRecord(place=HERE, messages=turns[place]))
    assert found is Reason.CONTROL_TOKEN
    assert "'<|im_" in detail


def refusal(folder, output, template):
    output.mkdir()
    with_chat_template(folder, output, template=template)
    with pytest.raises(UserError) as caught:
        encode(output, ChatRecord(place=HERE, messages=chat("Hi", "Hello")))
    return str(caught.value)


LOOP = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n%s{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SAID = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}%s{% endgeneration %}%s{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LOOP.replace("%s", "{{ m['content'] }}<|im_end|>\n"), "has no {% generation %} spans; wrap what the assistant says"),
        (
            LOOP.replace("%s", SAID.replace("%s", "", 1).replace("%s", "<|im_end|>\n")) + ASK,
            "no special token ends the turn in it; '<|im_end|>",
        ),
        (LOOP.replace("%s", SAID.replace("%s", "<|im_end|>\n", 1).replace("%s", "")), "asks with '"),
        ("{% generation %}Answer{% endgeneration %}{% if true %}{{ messages[0]['nothing']['x'] }}{% endif %}", "mend the template"),
        ("{% for m in messages %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% endfor %}", "not what the assistant says"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_say_what_to_train_on_is_refused_with_what_to_add(
    folders, tmp_path, template, expected
):
    message = refusal(folders["byte_level"], tmp_path / "t", template)
    assert expected in message
    assert str(tmp_path / "t") in message


def test_a_template_without_spans_serves_records_that_have_a_prompt(folders, tmp_path):
    (tmp_path / "t").mkdir()
    template = LOOP.replace("%s", "{{ m['content'] }}<|im_end|>\n") + ASK
    with_chat_template(folders["byte_level"], tmp_path / "t", template=template)
    record = CompletionRecord(place=HERE, prompt=chat("Hi"), completion=chat("", "Hello")[1:])
    assert trained_text(tmp_path / "t", document(tmp_path / "t", record)) == "Hello<|im_end|>"


def test_a_tokenizer_without_a_template_is_refused_for_conversations_and_serves_texts(plain_folders):
    with pytest.raises(UserError, match="has no chat template"):
        encode(plain_folders["byte_level"], ChatRecord(place=HERE, messages=chat("Hi", "Hello")))
    assert document(plain_folders["byte_level"], TextRecord(place=HERE, text="The lamp")).num_trained > 1


def test_a_template_that_rewrites_the_prompt_once_it_is_answered_is_a_bad_record(folders, tmp_path):
    (tmp_path / "t").mkdir()
    template = "{% if messages|length > 1 %}!{% endif %}" + DEFAULT_TEMPLATE
    with_chat_template(folders["byte_level"], tmp_path / "t", template=template)
    record = CompletionRecord(place=HERE, prompt=chat("Hi"), completion=chat("", "Hello")[1:])
    found, detail = reason(tmp_path / "t", record)
    assert (found, "renders the prompt in another way" in detail) == (Reason.TEMPLATE, True)


def test_a_template_that_asks_for_the_day_gives_the_same_tokens_every_day(folders, tmp_path):
    (tmp_path / "t").mkdir()
    with_chat_template(
        folders["byte_level"], tmp_path / "t", template='{{ strftime_now("%d %b %Y") }}' + DEFAULT_TEMPLATE
    )
    found = document(tmp_path / "t", ChatRecord(place=HERE, messages=chat("Hi", "Hello")))
    assert AutoTokenizer.from_pretrained(tmp_path / "t").decode(found.tokens).startswith("26 Jul 2024<|im_start|>")


def test_spans_hold_what_the_mask_of_transformers_loses(folders):
    """Its mask ends with the first token of a span's last character, and an emoji has several."""
    tokenizer = AutoTokenizer.from_pretrained(folders["byte_level"])
    tokenizer.chat_template = LOOP.replace("%s", SAID.replace("%s", "", 1).replace("%s", "<|im_end|>\n"))
    messages = chat("Hi", "Yes 🎉")
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    rendered = ChatTemplate(tokenizer, name="t").render(messages)
    (ours,) = TextTokenizer(tokenizer, name="t", longest=512).documents([_said(rendered)])
    assert ours.tokens.tolist() == theirs["input_ids"]
    assert tokenizer.decode(ours.tokens[ours.mask]) == "Yes 🎉"
    assert sum(theirs["assistant_masks"]) < ours.num_trained


def test_a_span_of_the_first_token_alone_ends_with_it(folders):
    """Where ``transformers``' mask goes on to the end of the text."""
    tokenizer = AutoTokenizer.from_pretrained(folders["byte_level"])
    said = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + said + "{% endfor %}"
    messages = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "\nHi"}, *chat("", "B")[1:]]
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert all(theirs["assistant_masks"])
    rendered = ChatTemplate(tokenizer, name="t").render(messages)
    (ours,) = TextTokenizer(tokenizer, name="t", longest=512).documents([_said(rendered)])
    assert tokenizer.decode(ours.tokens[ours.mask]) == "B"


@pytest.mark.parametrize("kind", KINDS)
def test_a_default_template_adds_two_tokens_at_the_end_and_moves_none(plain_folders, folders, kind):
    before = load_tokenizer(plain_folders[kind]).tokenizer.get_vocab(with_added_tokens=True)
    loaded = load_tokenizer(folders[kind])
    after = loaded.tokenizer.get_vocab(with_added_tokens=True)
    assert {token: after[token] for token in before} == before
    assert [after["<|im_start|>"], after["<|im_end|>"]] == [len(before), len(before) + 1]
    assert loaded.eod == END_OF_TEXT


def test_tokens_that_are_there_already_are_not_added_again(folders, tmp_path):
    vocab = load_tokenizer(folders["byte_level"]).tokenizer.get_vocab(with_added_tokens=True)
    config = json.loads((folders["byte_level"] / "tokenizer_config.json").read_text())
    del config["chat_template"]
    plain = save(load_tokenizer(folders["byte_level"]).tokenizer, tmp_path / "plain")
    (tmp_path / "again").mkdir()
    with_chat_template(plain, tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").tokenizer.get_vocab(with_added_tokens=True) == vocab


def test_a_tokenizer_keeps_the_template_that_it_has(folders, tmp_path):
    for name in ("config", "file"):
        folder = save(byte_level(), tmp_path / name, **({"chat_template": "own"} if name == "config" else {}))
        if name == "file":
            (folder / "chat_template.jinja").write_text("own")
        (tmp_path / f"{name}-out").mkdir()
        with_chat_template(folder, tmp_path / f"{name}-out")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"{name}-out")
        assert tokenizer.chat_template == "own"
        assert "<|im_start|>" not in tokenizer.get_vocab()


def test_a_vocabulary_with_holes_is_refused_where_a_new_token_would_take_an_id(tmp_path):
    value = json.loads(byte_level().to_str())
    vocab = value["model"]["vocab"]
    moved = max(vocab, key=vocab.get)
    vocab[moved] += 2
    (tmp_path / "holes").mkdir()
    (tmp_path / "holes" / "tokenizer.json").write_text(json.dumps(value))
    (tmp_path / "holes" / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="the vocabulary has holes"):
        with_chat_template(tmp_path / "holes", tmp_path / "out")


def test_an_answer_is_over_at_the_end_of_the_document_and_of_the_turn(folders, plain_folders):
    end = load_tokenizer(folders["byte_level"]).tokenizer.token_to_id("<|im_end|>")
    assert encoder(folders["byte_level"]).stop_ids() == [0, end]
    assert encoder(plain_folders["byte_level"]).stop_ids() == [0]


def test_what_is_too_long_keeps_its_beginning_and_is_counted(folders):
    record = CompletionRecord(place=HERE, prompt="The lamp", completion=" burns" * 100)
    whole = document(folders["byte_level"], record, sequence_length=4096)
    (cut,) = encode(folders["byte_level"], record, sequence_length=32)
    assert cut.truncated == 1
    assert cut.unit[0].tokens.tolist() == whole.tokens[:32].tolist()
    assert not cut.unit[0].mask[:2].any() and cut.unit[0].mask[-1]


@pytest.mark.parametrize(
    "record",
    [
        CompletionRecord(place=HERE, prompt="The lamp " * 50, completion="burns"),
        ChatRecord(place=HERE, messages=chat("The lamp " * 50, "burns")),
        PairRecord(place=HERE, prompt="The lamp " * 50, chosen="burns", rejected="is out"),
        PairRecord(place=HERE, prompt="The", chosen=" lamp" * 50 + " burns", rejected=" lamp" * 50 + " is out"),
        PromptRecord(place=HERE, prompt="The lamp " * 50, others={}),
    ],
)
def test_a_record_with_nothing_left_to_train_on_is_dropped(folders, record):
    (encoded,) = encode(folders["byte_level"], record, sequence_length=32)
    assert encoded.unit is None


def test_a_pair_is_cut_to_fit_together_and_its_longer_side_first(folders):
    record = PairRecord(place=HERE, prompt="The", chosen=" lamp burns" * 40, rejected=" lamp")
    (encoded,) = encode(folders["byte_level"], record, sequence_length=32)
    chosen, rejected = encoded.unit
    assert len(chosen) + len(rejected) == 32
    assert (encoded.truncated, rejected.tokens[-1]) == (1, 0)


def test_a_content_of_ten_megabytes_takes_bounded_work(folders):
    messages = chat("The lamp burns. " * 700_000, "x")
    answer = chat("Hi", "burns" * 2_000_000)
    records = [ChatRecord(place=HERE, messages=m) for m in (messages, answer)]
    dropped, kept = encode(folders["byte_level"], *records, sequence_length=64)
    assert dropped.unit is None
    assert len(kept.unit[0]) == 64


def test_bad_records_pass_through_in_order(folders):
    bad = BadRecord(place=HERE, reason=Reason.NOT_JSON, detail="x")
    good = TextRecord(place=HERE, text="The lamp")
    found = encode(folders["byte_level"], bad, good, bad)
    assert [isinstance(f, BadRecord) for f in found] == [True, False, True]
    assert found[1].record is good


def some_row(rng, shape):
    """A row with the columns of a shape, whose values are mostly not what they should be."""

    def scalar():
        return rng.choice([None, True, 0, -1.5, 10**30, "", " ", "x", "<|im_end|>", "\x00", "🎉", [], {}])

    def value(depth=0):
        if depth > 3 or rng.random() < 0.4:
            return scalar()
        if rng.random() < 0.3:
            return [value(depth + 1) for _ in range(rng.randint(0, 3))]
        names = ["role", "content", "tool_calls", "function", "name", "arguments", "type", "text"]
        return {rng.choice(names): value(depth + 1) for _ in range(rng.randint(0, 4))}

    def turn():
        content = rng.choice(["Hi", "Yes", "Yes\n", value(2)])
        found = {"role": rng.choice(["user", "assistant", "assistant", "tool", "x", None]), "content": content}
        call = {"function": {"name": rng.choice(["f", value()]), "arguments": value()}}
        return found | rng.choice([{}, {}, {"tool_calls": [call]}, {"tool_calls": value()}, {"thinking": value()}])

    def text():
        return rng.choice(["Hi", [turn() for _ in range(rng.randint(0, 3))], [turn()], value()])

    return {column: text() for column in shape.columns} | rng.choice(
        [{}, {"label": True}, {"margin": value(), "tools": value()}]
    )


def test_whatever_a_row_holds_it_is_a_unit_or_a_bad_record(folders):
    rng, records, bad = random.Random(seed_of_this_test()), [], 0
    for i in range(3000):
        shape = rng.choice([*Shape])
        try:
            records.append(parse(some_row(rng, shape), shape, place=Place(file="a.jsonl", number=i)))
        except Unusable as error:
            bad += 1
            assert error.detail
    found = encode(folders["byte_level"], *records, sequence_length=64)
    assert len(found) == len(records)
    units = [f.unit for f in found if not isinstance(f, BadRecord) and f.unit is not None]
    assert bad > 300 and len(units) > 100, "the generator has lost its bite"
    for unit in units:
        assert sum(len(d) for d in unit) <= 64


def test_white_space_that_a_special_token_swallows_is_swallowed_before_an_answer_too(folders, tmp_path):
    """Some special tokens, as Phi's, take the white space behind them; a model that is asked sees it gone."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|answer|>", special=True, normalized=False, rstrip=True)])
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    said = "{% if m['role'] == 'assistant' %}<|answer|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    template = "{% for m in messages %}" + said + "{% endfor %}{% if add_generation_prompt %}<|answer|>{% endif %}"
    folder = save(tokenizer, tmp_path / "t", chat_template=template)
    messages = chat("Hi", "  Yes")
    found = document(folder, ChatRecord(place=HERE, messages=messages))
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, return_dict=True)["input_ids"]
    assert found.tokens.tolist() == expected
    assert trained_text(folder, found) == "Yes<|end|>"


def test_settings_that_list_the_tokens_of_an_imported_tokenizer_do_not_hide_the_new_ones(tmp_path):
    listed = {"0": {"content": END_OF_TEXT, "special": True}}
    folder = save(byte_level(), tmp_path / "plain", added_tokens_decoder=listed, additional_special_tokens=[])
    (tmp_path / "out").mkdir()
    with_chat_template(folder, tmp_path / "out")
    found = document(tmp_path / "out", ChatRecord(place=HERE, messages=chat("Hi", "Yes")))
    end = load_tokenizer(tmp_path / "out").tokenizer.token_to_id("<|im_end|>")
    assert found.tokens[-1] == end
    assert encoder(tmp_path / "out").stop_ids() == [0, end]


def test_a_tokenizer_that_cuts_texts_by_itself_does_not_cut_records(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=64)
    folder = save(tokenizer, tmp_path / "t")
    found = document(folder, TextRecord(place=HERE, text="The lamp burns until the sun is up"))
    assert 4 < len(found) < 64
