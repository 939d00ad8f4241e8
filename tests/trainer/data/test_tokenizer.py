"""The tokenizer stage: deterministic training, exact round trips, and GPT-2's own merges give GPT-2's own ids."""

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from headrace_trainer.errors import UserError
from headrace_trainer.formats.documents import Document
from headrace_trainer.formats.tokenizer import END_OF_TEXT, load_tokenizer
from headrace_trainer.stages.tokenizer import run
from headrace_trainer.stages.tokenizer.train import sample_texts, train_bpe
from trainer.data import gpt2_merges
from trainer.data.builders import make_context, prose

STRINGS = [
    "Hello world",
    "  two  spaces\tand a tab\r\nnew line\n",
    "Grüße, naïve café",
    "世界 你好 🎉👩‍👩‍👧‍👦 नमस्ते שלום",
    "e\u0301 and \u00e9 stay apart",
    "\u200b\ufeff\x00\x7f",
    "def f(x):\n    return x ** 2  # 3.14",
    "<|endoftext|> in the middle",
]


def import_from(folder, tmp_path, **config):
    context = make_context(tmp_path, kind="tokenizer", config={"import": {"uri": str(folder)}} | config)
    return run(context), load_tokenizer(context.output), context.output


@pytest.mark.parametrize("text", STRINGS)
def test_every_string_comes_back_exactly(chain, text):
    tokenizer = AutoTokenizer.from_pretrained(chain.storage / "tokenizer")
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_transformers_loads_the_folder_with_the_end_of_text(chain):
    folder = chain.storage / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END_OF_TEXT, 0)
    assert tokenizer(END_OF_TEXT)["input_ids"] == [0]
    assert len(tokenizer) == 500
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == {
        "artifact.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_metrics_are_measured(chain):
    metrics = json.loads((chain.storage / "tokenizer" / "artifact.json").read_text())["metrics"]
    assert metrics["vocabSize"] == 500
    assert 2.5 < metrics["bytesPerToken"] < 6


def test_every_process_learns_the_same_merges(tmp_path):
    script = (
        "from headrace_trainer.stages.tokenizer.train import train_bpe\n"
        "from trainer.data.builders import prose\n"
        "print(train_bpe([prose(i) for i in range(200)], vocab_size=450).to_str())\n"
    )
    path = [p for p in sys.path if p]
    runs = [
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": ":".join(path), "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
        ).stdout
        for seed, threads in (("1", "1"), ("2", "4"))
    ]
    assert runs[0] == runs[1]
    assert json.loads(runs[0])["model"]["merges"]


def test_a_vocabulary_that_the_text_does_not_support_is_answered_with_the_largest_that_it_does():
    texts = [prose(seed) for seed in range(50)]
    with pytest.raises(
        UserError, match=r"tokenizer.vocabSize: 50000: the corpus supports at most (\d+) tokens"
    ) as caught:
        train_bpe(texts, vocab_size=50_000)
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert f"set vocabSize to {largest} or less" in str(caught.value)
    assert train_bpe(texts, vocab_size=largest).get_vocab_size() == largest


def test_a_sample_is_taken_from_the_whole_corpus_and_is_bounded():
    documents = [Document(id=f"a#{i}", text="x" * 100, source="a", language="en") for i in range(1000)]
    assert len(list(sample_texts(documents, part=1.0, max_bytes=10**9))) == 1000
    assert len(list(sample_texts(documents, part=1.0, max_bytes=1000))) == 10
    assert 60 < len(list(sample_texts(documents, part=0.1, max_bytes=10**9))) < 140


@pytest.fixture(scope="session")
def gpt2_files():
    try:
        return gpt2_merges.fetch()
    except gpt2_merges.Unavailable as reason:
        pytest.skip(str(reason))


# Ids of OpenAI's encoder, as published with GPT-2.
GPT2_IDS = [
    ("Hello world", [15496, 995]),
    ("<|endoftext|>", [50256]),
    ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
]


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2s_merges_give_gpt2s_ids(gpt2_files, tmp_path, names):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    for source, name in zip(gpt2_merges.FILES, names, strict=True):
        (folder / name).write_bytes((gpt2_files / source).read_bytes())
    metrics, loaded, output = import_from(folder, tmp_path)
    assert metrics == {"vocabSize": 50257}
    assert (loaded.eod, loaded.eod_id) == (END_OF_TEXT, 50256)
    tokenizer = AutoTokenizer.from_pretrained(output)
    for text, ids in GPT2_IDS:
        assert tokenizer(text)["input_ids"] == ids
    for text in STRINGS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_tokenizer_json_is_imported_with_its_own_end_of_document_and_settings(chain, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    value = json.loads((chain.storage / "tokenizer" / "tokenizer.json").read_text().replace(END_OF_TEXT, "</s>"))
    (folder / "tokenizer.json").write_text(json.dumps(value))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "chat_template": "{{ x }}"})
    )
    metrics, loaded, output = import_from(folder, tmp_path)
    assert (metrics["vocabSize"], loaded.eod, loaded.eod_id) == (500, "</s>", 0)
    assert AutoTokenizer.from_pretrained(output).chat_template == "{{ x }}"


def test_a_tokenizer_without_an_end_of_document_is_given_one(chain, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    value = json.loads((chain.storage / "tokenizer" / "tokenizer.json").read_text().replace(END_OF_TEXT, "<pad>"))
    (folder / "tokenizer.json").write_text(json.dumps(value))
    metrics, loaded, _ = import_from(folder, tmp_path)
    assert (metrics["vocabSize"], loaded.eod, loaded.eod_id) == (501, END_OF_TEXT, 500)


def test_a_tokenizer_is_imported_from_s3(chain, tmp_path, s3):
    client, storage = s3
    client.upload_file(str(chain.storage / "tokenizer" / "tokenizer.json"), "bucket", "tok/tokenizer.json")
    config = {"import": {"uri": "s3://bucket/tok"}}
    context = make_context(tmp_path, kind="tokenizer", config=config, storage=storage)
    assert run(context) == {"vocabSize": 500}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "found none of its files; the folder must hold tokenizer.json, or one of vocab.json and encoder.json"),
        ({"vocab.json": "{}"}, "found vocab.json; the folder must hold"),
        ({"tokenizer.json": "{"}, "tokenizer.json: cannot be read as a tokenizer.json"),
        ({"vocab.json": "{}", "merges.txt": "a b\n"}, "vocab.json and merges.txt cannot be read as BPE"),
        ({"tokenizer_config.json": "["}, "tokenizer_config.json: not valid JSON"),
    ],
)
def test_a_folder_that_cannot_be_imported_is_named(tmp_path, files, expected):
    folder = tmp_path / "import"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(UserError) as caught:
        import_from(folder, tmp_path)
    assert expected in str(caught.value)
