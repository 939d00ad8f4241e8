"""Packing: every unit once, none cut, little padding; and an order that the number of consumed packs finds again."""

import random

import numpy as np
import pytest

from headrace_trainer.formats.packs import Bins, Document, Packing, PackOrder, Share, best_fit, permutation
from headrace_trainer.formats.units import Units, UnitWriter
from manifests import seed_of_this_test


def bins_of(lengths, capacity, **options):
    found = best_fit(np.array(lengths, dtype=np.int64), capacity=capacity, **options)
    return [found[i].tolist() for i in range(len(found))]


def one_by_one(lengths, capacity):
    """Best-fit decreasing as the textbook has it: the room that each unit takes, and how many bins there are."""
    rooms, taken = [], []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        best = min(fitting, key=lambda i: rooms[i])
        taken.append(rooms[best])
        rooms[best] -= length
    return sorted(rooms), taken


def test_packing_is_best_fit_decreasing():
    rng = random.Random(seed_of_this_test())
    for _ in range(200):
        capacity = rng.randint(1, 60)
        lengths = [rng.randint(1, capacity) for _ in range(rng.randint(0, 80))]
        bins = bins_of(lengths, capacity)
        rooms = sorted(capacity - sum(lengths[u] for u in units) for units in bins)
        assert rooms == one_by_one(lengths, capacity)[0], (lengths, capacity)
        assert sorted(u for units in bins for u in units) == [*range(len(lengths))]


@pytest.mark.parametrize(
    ("lengths", "capacity", "expected"),
    [
        ([], 8, []),
        ([8], 8, [[0]]),
        ([3, 8, 5], 8, [[1], [2, 0]]),
        ([4, 4, 4, 4], 8, [[0, 1], [2, 3]]),
        ([5, 4, 3, 2], 7, [[0, 3], [1, 2]]),
        ([0, 0, 8], 8, [[2, 0, 1]]),
        ([1] * 5, 1, [[0], [1], [2], [3], [4]]),
    ],
)
def test_packing_by_example(lengths, capacity, expected):
    assert bins_of(lengths, capacity) == expected


def test_what_is_packed_together_changes_with_the_order_and_how_well_does_not():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 200, 2000)
    first, second = (best_fit(lengths, capacity=256, order=permutation(2000, key=k)) for k in "ab")
    assert len(first) == len(second)
    pairs = [{frozenset(b[i].tolist()) for i in range(len(b))} for b in (first, second)]
    assert len(pairs[0] & pairs[1]) < len(first) / 2


def test_a_permutation_depends_on_its_key_alone():
    assert permutation(10, key="7:0:units").tolist() == [3, 1, 0, 2, 4, 8, 9, 6, 5, 7]
    assert sorted(permutation(1000, key="a").tolist()) == [*range(1000)]
    assert permutation(1000, key="a").tolist() != permutation(1000, key="b").tolist()
    assert permutation(0, key="a").tolist() == []


def lengths_like_chats(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(5.0, 1.0, count), 1, 1024).astype(np.int64)


def packs_of(order, first, count):
    return [order.units(i).tolist() for i in range(first, first + count)]


@pytest.mark.parametrize("packing", Packing)
def test_every_epoch_takes_every_unit_once_in_another_order(packing):
    order = PackOrder(lengths_like_chats(500), capacity=1024, seed=3, packing=packing)
    size = order.packs_per_epoch
    epochs = [packs_of(order, e * size, size) for e in range(3)]
    for packs in epochs:
        assert sorted(u for units in packs for u in units) == [*range(500)]
    assert epochs[0] != epochs[1] != epochs[2]
    if packing is Packing.NONE:
        assert size == 500


def test_the_number_of_consumed_packs_is_the_whole_state_of_the_data():
    """A new process that is told nothing but a number goes on with the same packs."""
    lengths, shares = (
        lengths_like_chats(400),
        [Share(first=0, count=150, weight=2.5), Share(first=150, count=250, weight=0.3)],
    )
    whole = packs_of(PackOrder(lengths, capacity=1024, seed=3, shares=shares), 0, 500)
    for consumed in (0, 1, 77, 250, 499):
        fresh = PackOrder(lengths, capacity=1024, seed=3, shares=shares)
        assert packs_of(fresh, consumed, 1) == [whole[consumed]], consumed
    assert packs_of(PackOrder(lengths, capacity=1024, seed=4, shares=shares), 0, 500) != whole


def test_weights_are_how_often_an_epoch_takes_a_unit_and_broken_ones_go_round():
    shares = [
        Share(first=0, count=4, weight=2),
        Share(first=4, count=10, weight=0.5),
        Share(first=14, count=3, weight=1),
    ]
    order = PackOrder(np.ones(17, dtype=np.int64), capacity=8, seed=1, shares=shares, packing=Packing.NONE)
    size = order.packs_per_epoch
    assert size == 8 + 5 + 3
    epochs = [
        np.bincount(np.concatenate([order.units(i) for i in range(e * size, (e + 1) * size)]), minlength=17)
        for e in range(2)
    ]
    for taken in epochs:
        assert taken[:4].tolist() == [2] * 4
        assert taken[4:14].sum() == 5
        assert taken[14:].tolist() == [1] * 3
    assert (epochs[0] + epochs[1])[4:14].tolist() == [1] * 10


@pytest.mark.parametrize("weight", [0.001, 0.1, 1 / 3, 1.7, 99.99])
def test_over_many_epochs_a_unit_is_taken_as_often_as_its_weight_says(weight):
    share = Share(first=5, count=100, weight=weight)
    taken = np.concatenate([share.units(epoch=e, key="k") for e in range(100)])
    counts = np.bincount(taken, minlength=105)[5:]
    assert counts.sum() == pytest.approx(weight * 100 * 100, abs=1)
    assert counts.max() - counts.min() <= 1


def test_a_weight_too_small_to_take_anything_in_an_epoch_makes_an_epoch_of_no_packs():
    shares = [Share(first=0, count=2, weight=0.1)]
    order = PackOrder(np.array([4, 4]), capacity=8, seed=1, shares=shares, packing=Packing.NONE)
    assert packs_of(order, 0, 4) == [[0], [1], [0], [1]] or packs_of(order, 0, 4) == [[1], [0], [1], [0]]


def test_epochs_are_counted_in_packs():
    order = PackOrder(np.full(8, 4), capacity=8, seed=1)
    assert [order.epoch_of(i) for i in (0, 1, 4, 6)] == [0.0, 0.25, 1.0, 1.5]


def test_efficiency_is_the_share_of_positions_with_a_token():
    assert PackOrder(np.array([4, 4, 6]), capacity=8, seed=1).efficiency() == 14 / 16
    assert PackOrder(np.array([4, 4, 6]), capacity=8, seed=1, packing=Packing.NONE).efficiency() == 14 / 24
    assert PackOrder(lengths_like_chats(20_000), capacity=1024, seed=1).efficiency() > 0.99


def test_packs_do_not_get_slower_with_the_square_of_the_units():
    """A hundred times as many units of as many lengths take far fewer than ten thousand times as many steps."""
    from headrace_trainer.formats import packs

    steps, take = [], packs._Rooms._take
    try:
        for count in (2_000, 200_000):
            steps.append(0)

            def counted(self, *args):
                steps[-1] += 1
                return take(self, *args)

            packs._Rooms._take = counted
            best_fit(lengths_like_chats(count), capacity=1024)
    finally:
        packs._Rooms._take = take
    assert steps[1] < 3 * 200_000 and steps[1] < 100 * steps[0]


def document(*tokens, trained=None, **fields):
    mask = np.ones(len(tokens), dtype=bool) if trained is None else np.array(trained, dtype=bool)
    mask[:1] = False
    return Document(tokens=np.array(tokens, dtype=np.int64), mask=mask, **fields)


def test_units_come_back_from_the_disk_as_they_were(tmp_path):
    units = [
        (document(1, 2, 3, trained=[0, 0, 1]),),
        (document(4, 5, margin=0.5), document(4, 6, 7)),
        (document(9, 200_000, label=True),),
        (document(8, 9, label=False),),
    ]
    with UnitWriter(tmp_path / "units") as writer:
        for unit in units:
            writer.add(unit)
    found = Units(tmp_path / "units")
    assert (len(found), found.lengths.tolist()) == (4, [3, 5, 2, 2])
    for one, other in zip(units, (found[i] for i in range(4)), strict=True):
        assert [d.tokens.tolist() for d in one] == [d.tokens.tolist() for d in other]
        assert [d.mask.tolist() for d in one] == [d.mask.tolist() for d in other]
        assert [(d.label, d.margin) for d in one] == [(d.label, d.margin) for d in other]
    assert found[1][0].tokens.dtype == np.int64 and found[1][0].mask.dtype == bool
    assert found.num_trained == 1 + 1 + 2 + 1 + 1
    pack = found.pack(np.array([1, 0]))
    assert [d.tokens.tolist() for d in pack.documents] == [[4, 5], [4, 6, 7], [1, 2, 3]]
    assert len(pack) == 8
    with pytest.raises(IndexError):
        found[4]


def test_a_writer_that_failed_leaves_nothing_that_reads_as_whole(tmp_path):
    with pytest.raises(RuntimeError), UnitWriter(tmp_path) as writer:
        writer.add((document(1, 2),))
        raise RuntimeError
    with pytest.raises(FileNotFoundError):
        Units(tmp_path)


def test_a_pair_stays_in_one_pack(tmp_path):
    rng = np.random.default_rng(2)
    with UnitWriter(tmp_path) as writer:
        for i in range(200):
            writer.add(tuple(document(*([i] * int(n))) for n in rng.integers(2, 30, 2)))
    units = Units(tmp_path)
    order = PackOrder(units.lengths, capacity=64, seed=1)
    for i in range(order.packs_per_epoch):
        documents = units.pack(order.units(i)).documents
        assert len(documents) % 2 == 0 and sum(map(len, documents)) <= 64
        assert all(a.tokens[0] == b.tokens[0] for a, b in zip(documents[::2], documents[1::2], strict=True))


def test_bins_are_rows():
    bins = Bins(units=np.array([3, 1, 2]), starts=np.array([0, 1, 3]))
    assert (len(bins), bins[0].tolist(), bins[1].tolist()) == (2, [3], [1, 2])
