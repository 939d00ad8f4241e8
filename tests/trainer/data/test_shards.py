"""The shards stage: Megatron reads back the same ids, documents end where they should, and the manifest is correct."""

import hashlib
import json

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from headrace_trainer.errors import UserError
from headrace_trainer.formats.documents import read_documents
from headrace_trainer.formats.shards.manifest import read_manifest
from headrace_trainer.formats.shards.split import Split, split_of
from headrace_trainer.stages.shards.stage import token_dtype
from headrace_trainer.stages.shards.writer import ShardWriter
from trainer.data.builders import prose
from trainer.data.conftest import run_chain


@pytest.fixture(scope="module")
def shards(chain):
    return chain.storage / "shards"


@pytest.fixture(scope="module")
def manifest(shards):
    return read_manifest(shards)


def read_with_megatron(prefix):
    """Ids of every document. Copied, because the dataset closes its memory map when it goes."""
    dataset = IndexedDataset(str(prefix))
    return [document.copy() for document in dataset[:]]


def documents_of(shards, manifest, split):
    """Ids of every document of a split, read by Megatron-core."""
    own = [shard for shard in manifest.shards if shard.split is split]
    return [document for shard in own for document in read_with_megatron(shards / shard.prefix)]


def test_megatron_reads_back_the_ids_of_every_text(chain, shards, manifest):
    tokenizer = Tokenizer.from_file(str(shards / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    texts = {s: [] for s in Split}
    for document in read_documents(chain.storage / "corpus"):
        texts[split_of(document.text, validation_ratio=0.1)].append(document.text)
    for split in Split:
        found = documents_of(shards, manifest, split)
        assert len(found) == len(texts[split]) == manifest.documents[split] > 0
        for ids, text in zip(found, texts[split], strict=True):
            assert ids.dtype == np.uint16
            assert ids[-1] == manifest.eod_id
            assert ids[:-1].tolist() == tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


def test_a_text_that_quotes_the_end_of_text_does_not_end_there(shards, manifest):
    ends = [(ids == manifest.eod_id).sum() for split in Split for ids in documents_of(shards, manifest, split)]
    assert {*ends} == {1}


def test_the_manifest_counts_what_is_there(chain, shards, manifest):
    for split in Split:
        found = documents_of(shards, manifest, split)
        own = [s for s in manifest.shards if s.split is split]
        assert manifest.tokens[split] == sum(map(len, found)) == sum(s.tokens for s in own)
        assert manifest.documents[split] == len(found) == sum(s.documents for s in own)
    texts = [d.text for d in read_documents(chain.storage / "corpus")]
    assert sum(manifest.bytes.values()) == sum(len(t.encode()) for t in texts)
    for shard in manifest.shards:
        for suffix, digest in ((".bin", shard.bin_sha256), (".idx", shard.idx_sha256)):
            assert hashlib.sha256((shards / f"{shard.prefix}{suffix}").read_bytes()).hexdigest() == digest
    assert (manifest.vocab_size, manifest.eod_id, manifest.dtype) == (500, 0, "uint16")


def test_shards_are_cut_at_their_size(shards, manifest):
    sizes = [(shards / f"{s.prefix}.bin").stat().st_size for s in manifest.shards if s.split is Split.TRAIN]
    assert len(sizes) > 1
    assert all(2**16 - 2000 < size <= 2**16 for size in sizes[:-1])


def test_the_unigram_counts_are_those_of_the_training_split(shards, manifest):
    counts = np.load(shards / "unigram.npy")
    expected = np.bincount(np.concatenate(documents_of(shards, manifest, Split.TRAIN)), minlength=500)
    assert counts.dtype == np.int64
    assert counts.tolist() == expected.tolist()


def test_the_metrics_say_how_much_there_is(shards, manifest):
    metrics = json.loads((shards / "artifact.json").read_text())["metrics"]
    assert metrics["trainTokens"] == manifest.tokens[Split.TRAIN]
    assert metrics["documentsIn"] == sum(manifest.documents.values())
    assert metrics["bytesPerToken"] == pytest.approx(sum(manifest.bytes.values()) / sum(manifest.tokens.values()))


def test_the_same_corpus_gives_the_same_artifact(tmp_path):
    first, second = (run_chain(tmp_path / name, [prose(seed) for seed in range(40)], vocab_size=320) for name in "ab")
    for stage in ("tokenizer", "shards"):
        files = [sorted(p for p in (c.storage / stage).rglob("*") if p.is_file()) for c in (first, second)]
        contents = [{p.name: p.read_bytes() for p in fs if p.name != "artifact.json"} for fs in files]
        assert contents[0] == contents[1]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(500, "uint16"), (65_536, "uint16"), (65_537, "int32")])
def test_tokens_take_two_bytes_where_every_id_fits(vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_reads_both_widths(tmp_path, dtype):
    writer = ShardWriter(tmp_path, Split.TRAIN, dtype=dtype, shard_bytes=2**20)
    largest = 65_535 if dtype == "uint16" else 99_999
    writer.write([1, 2, largest])
    writer.write([0])
    writer.close()
    assert [d.tolist() for d in read_with_megatron(tmp_path / "train-00000")] == [[1, 2, largest], [0]]
    assert IndexedDataset(str(tmp_path / "train-00000")).document_indices.tolist() == [0, 1, 2]
    assert [s.tokens for s in writer.shards] == [4]


def test_a_document_larger_than_a_shard_has_one_for_itself(tmp_path):
    writer = ShardWriter(tmp_path, Split.TRAIN, dtype="uint16", shard_bytes=100)
    for length in (10, 500, 10, 40, 1):
        writer.write([1] * length)
    writer.close()
    assert [s.tokens for s in writer.shards] == [10, 500, 50, 1]


def test_the_split_is_decided_by_the_text_alone_and_in_the_stated_ratio():
    sides = [split_of(prose(seed), validation_ratio=0.1) for seed in range(5000)]
    assert sides.count(Split.VALIDATION) == pytest.approx(500, abs=80)
    smaller = [split_of(prose(seed), validation_ratio=0.02) for seed in range(5000)]
    assert all(side is Split.TRAIN or sides[i] is Split.VALIDATION for i, side in enumerate(smaller))


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.0001, "shards.validationRatio: 0.0001: none of 40 documents is for validation; raise it"),
        (0.9999, "shards.validationRatio: 0.9999: none of 40 documents is for training; lower it"),
    ],
)
def test_an_empty_split_is_an_error(tmp_path, ratio, expected):
    with pytest.raises(UserError) as caught:
        run_chain(tmp_path, [prose(seed) for seed in range(40)], vocab_size=320, validationRatio=ratio)
    assert expected in str(caught.value)
    assert not (tmp_path / "storage" / "shards").exists()
