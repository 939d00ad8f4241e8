"""Documents of tokens laid end to end in packs of a fixed length, in an order that is a function of seed and lengths.

In: the lengths of units (a document, or a pair that must stay together). Out: which units each pack of the run holds.
``best_fit`` packs, ``PackOrder`` numbers the packs of all epochs: the number of packs that were consumed is the whole
state of the data. Next: ``engine.packed`` makes tensors of a ``Pack``.
"""

import bisect
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Document:
    """Tokens that see each other and nobody else."""

    tokens: np.ndarray
    """int64 [n]."""
    mask: np.ndarray
    """bool [n]; whether ``tokens[i]`` is trained on, as a label. The first never is: nothing comes before it."""
    label: bool | None = None
    """Whether the completion is wanted, where records have a label (KTO)."""
    margin: float | None = None
    """By how much the chosen side is better, on the first document of a pair."""

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.mask.shape and self.tokens.ndim == 1
        assert not self.mask[:1].any()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_trained(self) -> int:
        """Tokens that are trained on."""
        return int(self.mask.sum())


Unit = tuple[Document, ...]
"""What stays in one pack: a document, or the chosen and the rejected side of a pair."""


def unit_length(unit: Unit) -> int:
    """Tokens of a unit."""
    return sum(len(document) for document in unit)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Documents that share a row; their lengths add up to at most the row's."""

    documents: tuple[Document, ...]

    def __len__(self) -> int:
        return sum(len(document) for document in self.documents)


class Packing(StrEnum):
    """How many units a pack has."""

    BEST_FIT = "bestFit"
    NONE = "none"


@dataclass(frozen=True, kw_only=True, eq=False)
class Bins:
    """Units by bin, in compressed rows: bin ``i`` holds ``units[starts[i]:starts[i + 1]]``."""

    units: np.ndarray
    """int64 [number of units]."""
    starts: np.ndarray
    """int64 [number of bins + 1]."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.units[self.starts[index] : self.starts[index + 1]]


def best_fit(lengths: np.ndarray, *, capacity: int, order: np.ndarray | None = None) -> Bins:
    """Best-fit decreasing: the longest unit first, each into the fullest bin that has room for it.

    Uses at most 11/9 of the fewest bins that are possible, plus one (Johnson, doi 10.1016/S0022-0000(74)80026-7). Units of
    one length are placed together, so the work is that of sorting and of the distinct lengths, not of searching for each.

    Args:
        lengths: int [n], each from 0 to ``capacity``.
        capacity: tokens of a bin.
        order: int [n], a permutation; which of several units of one length comes first.

    Returns:
        The bins, in the order in which they were opened; the same for the same arguments on every machine.
    """
    assert lengths.size == 0 or (lengths.min() >= 0 and lengths.max() <= capacity)
    order = np.arange(len(lengths)) if order is None else order
    by_length = order[np.argsort(-lengths[order], kind="stable")]
    bin_of = np.empty(len(lengths), dtype=np.int64)
    rooms = _Rooms(capacity)
    for group in _runs(lengths[by_length]):
        units = by_length[group]
        bin_of[units] = rooms.place(len(units), length=int(lengths[units[0]]))
    return _as_bins(bin_of, by_length, num_bins=rooms.num_bins)


def _runs(values: np.ndarray) -> Iterator[slice]:
    """Where equal neighbours stand."""
    if len(values):
        edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
        yield from (slice(a, b) for a, b in itertools.pairwise(edges))


def _as_bins(bin_of: np.ndarray, units: np.ndarray, *, num_bins: int) -> Bins:
    placed = bin_of[units]
    starts = np.concatenate([[0], np.cumsum(np.bincount(placed, minlength=num_bins))]).astype(np.int64)
    return Bins(units=units[np.argsort(placed, kind="stable")], starts=starts)


class _Rooms:
    """Open bins by the room that they have left."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._bins: dict[int, list[int]] = {}
        self._some = 0
        """Bit ``r`` is set where a bin has room ``r``: the smallest room that suffices is a few operations on one number."""
        self.num_bins = 0

    def place(self, count: int, *, length: int) -> list[int]:
        """The bins of ``count`` units of one length."""
        placed: list[int] = []
        while (left := count - len(placed)) > 0:
            room = self._best_room(length)
            each = room // length if length else left  # empty units take no room
            bins = self._take(room, -(-left // each))
            if len(bins) == 1:
                placed += bins * min(each, left)
                self._put(bins, room - min(each, left) * length)
                continue
            last = min(each, left - each * (len(bins) - 1))
            placed += [b for b in bins[:-1] for _ in range(each)] + bins[-1:] * last
            self._put(bins[:-1], room - each * length)
            self._put(bins[-1:], room - last * length)
        return placed

    def _best_room(self, length: int) -> int:
        """The least room of an open bin that suffices; that of a new one where none does."""
        fitting = self._some >> length
        return length + (fitting & -fitting).bit_length() - 1 if fitting else self._capacity

    def _take(self, room: int, most: int) -> list[int]:
        """Up to ``most`` of the bins with this room; where there are none, as many new ones."""
        bins = self._bins.get(room)
        if not bins:
            first, self.num_bins = self.num_bins, self.num_bins + most
            return list(range(first, self.num_bins))
        taken = bins[-most:]
        del bins[-most:]
        if not bins:
            self._some ^= 1 << room
        return taken

    def _put(self, bins: list[int], room: int) -> None:
        if bins:
            self._bins.setdefault(room, []).extend(bins)
            self._some |= 1 << room


def no_packing(lengths: np.ndarray, *, order: np.ndarray | None = None) -> Bins:
    """A bin for each unit."""
    units = np.arange(len(lengths)) if order is None else order
    return Bins(units=units, starts=np.arange(len(lengths) + 1))


def permutation(count: int, *, key: str) -> np.ndarray:
    """A pseudorandom permutation, int64 [count]: the same for a key with every version of numpy.

    Positions are sorted by a hash of theirs: SplitMix64's finalizer (Steele and others, doi 10.1145/2660193.2660195) over
    a counter that begins where the key says.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """Units that belong together, numbered from ``first``, and how often an epoch takes them."""

    first: int
    count: int
    weight: float = 1.0

    def units(self, *, epoch: int, key: str) -> np.ndarray:
        """The units that an epoch takes, int64; those of a broken weight follow a fixed permutation from epoch to epoch.

        Weight 2.5 takes each unit twice, and half of them once more; the next epoch takes the other half.
        """
        whole, part = int(self.weight), self.weight - int(self.weight)
        taken = np.tile(np.arange(self.count), whole)
        begin, end = (round(part * self.count * e) for e in (epoch, epoch + 1))
        if end > begin:
            some = permutation(self.count, key=key)[np.arange(begin, end) % self.count]
            taken = np.concatenate([taken, some])
        return taken + self.first


class PackOrder:
    """The packs of all epochs, numbered through: a function of seed, lengths, shares and capacity alone.

    Every epoch shuffles anew which of equally long units share a pack, and the packs.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        capacity: int,
        seed: int,
        packing: Packing = Packing.BEST_FIT,
        shares: Sequence[Share] | None = None,
    ) -> None:
        """Number the packs.

        Args:
            lengths: tokens of each unit, int [n], each from 1 to ``capacity``.
            capacity: tokens of a pack.
            seed: decides the order.
            packing: how many units a pack has.
            shares: parts of the units with their weights; all units once an epoch if None.
        """
        assert len(lengths) > 0
        self._lengths, self._capacity, self._seed, self._packing = lengths, capacity, seed, packing
        self._shares = (Share(first=0, count=len(lengths)),) if shares is None else tuple(shares)
        self._firsts = [0]
        """The number of the first pack of each epoch that was packed so far, and of the next."""
        self._epoch = functools.lru_cache(maxsize=2)(self._pack_epoch)

    @property
    def packs_per_epoch(self) -> int:
        """Packs in the first epoch; with whole weights, in every one."""
        return self._first_of(1)

    def units(self, index: int) -> np.ndarray:
        """The units of pack ``index`` of the run, int64."""
        epoch = self._epoch_at(index)
        bins, shuffled = self._epoch(epoch)
        return bins[int(shuffled[index - self._first_of(epoch)])]

    def epoch_of(self, index: int) -> float:
        """How many epochs are done when ``index`` packs are, as 1.25."""
        epoch = self._epoch_at(index)
        first, end = self._first_of(epoch), self._first_of(epoch + 1)
        return epoch + (index - first) / (end - first)

    def efficiency(self, epoch: int = 0) -> float:
        """The share of an epoch's positions that hold a token and not padding."""
        bins, _ = self._epoch(epoch)
        return float(self._lengths[bins.units].sum()) / (self._capacity * max(1, len(bins)))

    def _epoch_at(self, index: int) -> int:
        while self._firsts[-1] <= index:
            self._first_of(len(self._firsts))
        return bisect.bisect_right(self._firsts, index) - 1

    def _first_of(self, epoch: int) -> int:
        while len(self._firsts) <= epoch:
            self._firsts.append(self._firsts[-1] + self._num_packs(len(self._firsts) - 1))
        return self._firsts[epoch]

    def _num_packs(self, epoch: int) -> int:
        """Whole weights give every epoch the same lengths, and so the same number of packs; others have to be packed."""
        if epoch > 0 and all(share.weight == int(share.weight) for share in self._shares):
            return self._firsts[1]
        return len(self._epoch(epoch)[0])

    def _pack_epoch(self, epoch: int) -> tuple[Bins, np.ndarray]:
        taken = np.concatenate(
            [s.units(epoch=epoch, key=f"{self._seed}:share:{i}") for i, s in enumerate(self._shares)]
        )
        order = permutation(len(taken), key=f"{self._seed}:{epoch}:units")
        lengths = self._lengths[taken]
        if self._packing is Packing.NONE:
            bins = no_packing(lengths, order=order)
        else:
            bins = best_fit(lengths, capacity=self._capacity, order=order)
        bins = Bins(units=taken[bins.units], starts=bins.starts)
        return bins, permutation(len(bins), key=f"{self._seed}:{epoch}:packs")
