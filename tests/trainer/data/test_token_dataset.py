"""The sample order: each sample once per epoch, reshuffled every epoch, and independent of everything else."""

import json
import shutil

import numpy as np
import pytest

from headrace_trainer.errors import StorageError, UserError
from headrace_trainer.formats.shards.order import shuffle_key, shuffled
from headrace_trainer.formats.shards.reader import TokenDataset

T = 64


@pytest.fixture(scope="module")
def shards(chain):
    return chain.storage / "shards"


@pytest.fixture(scope="module")
def train(shards):
    return TokenDataset(shards, "train", T, seed=7)


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def stream_of(shards, dataset, split):
    """Every token of a split, read without the class under test."""
    paths = sorted(shards.glob(f"{split}-*.bin"))
    return np.concatenate([np.fromfile(path, np.uint16) for path in paths]).astype(np.int64)


def windows(dataset, epoch):
    first = epoch * dataset.num_samples
    return [dataset.sample(i).tobytes() for i in range(first, first + dataset.num_samples)]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_the_order_is_a_permutation_of_any_number_of_samples(num_samples):
    key = shuffle_key(seed=1, epoch=0, manifest_digest="m")
    order = [shuffled(i, num_samples=num_samples, key=key) for i in range(num_samples)]
    assert sorted(order) == list(range(num_samples))


def test_the_order_looks_random():
    num_samples = 10_000
    key = shuffle_key(seed=1, epoch=0, manifest_digest="m")
    order = np.array([shuffled(i, num_samples=num_samples, key=key) for i in range(num_samples)])
    assert abs(np.corrcoef(order, np.arange(num_samples))[0, 1]) < 0.04
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.04
    # In a random permutation two neighbours stay neighbours with probability 2 / n: two are expected.
    assert (np.abs(np.diff(order)) == 1).sum() < 10
    halves = (order[:5000] < 5000).mean()
    assert halves == pytest.approx(0.5, abs=0.03)


def test_the_order_never_changes_between_versions():
    key = shuffle_key(seed=1234, epoch=3, manifest_digest="0" * 64)
    assert [shuffled(i, num_samples=1000, key=key) for i in range(8)] == [810, 362, 214, 486, 608, 140, 957, 501]


def test_an_epoch_has_every_window_of_the_stream_once(shards, train):
    stream = stream_of(shards, train, "train")
    assert train.num_tokens == len(stream)
    assert train.num_samples == (len(stream) - 1) // T
    expected = [stream[i * T : i * T + T + 1].tobytes() for i in range(train.num_samples)]
    for epoch in (0, 1):
        assert sorted(windows(train, epoch)) == sorted(expected)


def test_a_sample_is_one_longer_than_the_sequence_and_may_go_over_the_end_of_a_shard(shards, train):
    first_shard = train.manifest.shards[0].tokens
    stream = stream_of(shards, train, "train")
    window = stream[first_shard // T * T :][: T + 1]
    assert first_shard % T
    assert any(np.array_equal(train.sample(i), window) for i in range(train.num_samples))
    assert train.sample(0).shape == (T + 1,)
    assert train.sample(0).dtype == np.int64


def test_every_epoch_and_every_seed_has_an_order_of_its_own(shards, train):
    other = TokenDataset(shards, "train", T, seed=8)
    orders = [windows(train, 0), windows(train, 1), windows(train, 2), windows(other, 0)]
    for i, order in enumerate(orders):
        assert all(order != later for later in orders[i + 1 :])


def test_the_order_depends_on_the_counter_alone(shards, train):
    reference = [train.sample(i) for i in range(100)]
    again = TokenDataset(shards, "train", T, seed=7, verify=False)
    for index in np.random.default_rng(0).permutation(100):
        assert np.array_equal(again.sample(int(index)), reference[index])


def test_other_data_have_another_order(copy, train):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizer_sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert windows(TokenDataset(copy, "train", T, seed=7), 0) != windows(train, 0)


def test_validation_has_one_shuffled_order_for_every_run_and_epoch(shards):
    dataset = TokenDataset(shards, "validation", T, seed=7)
    stream = stream_of(shards, dataset, "validation")
    in_order = [stream[i * T : i * T + T + 1].tobytes() for i in range(dataset.num_samples)]
    order = windows(dataset, 0)
    assert sorted(order) == sorted(in_order)
    assert order != in_order
    assert order == windows(dataset, 1) == windows(TokenDataset(shards, "validation", T, seed=8), 0)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_shard_that_changed_is_named_with_both_digests(copy, suffix):
    path = copy / f"train-00001{suffix}"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError) as caught:
        TokenDataset(copy, "train", T, seed=7)
    manifest = json.loads((copy / "manifest.json").read_text())
    expected = next(s for s in manifest["shards"] if s["prefix"] == "train-00001")[f"{suffix[1:]}_sha256"]
    assert f"{path}: the shard is corrupt: sha256 is" in str(caught.value)
    assert f"the manifest says {expected}" in str(caught.value)
    assert TokenDataset(copy, "validation", T, seed=7).num_samples > 0


def test_a_shard_that_is_gone_is_named(copy):
    (copy / "train-00000.bin").unlink()
    with pytest.raises(StorageError, match=r"train-00000.bin: the shard is missing"):
        TokenDataset(copy, "train", T, seed=7)


def test_a_folder_without_a_manifest_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"manifest.json: unreadable"):
        TokenDataset(tmp_path, "train", T, seed=7)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_too_little_text_for_one_sample_is_an_error(shards, split):
    tokens = TokenDataset(shards, split, 1, seed=7).num_tokens
    assert TokenDataset(shards, split, tokens - 1, seed=7).num_samples == 1
    with pytest.raises(UserError, match=f"sequenceLength: {tokens}: the {split} split has {tokens} tokens"):
        TokenDataset(shards, split, tokens, seed=7)
