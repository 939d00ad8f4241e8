"""The newest version of every object of one kind, whatever order events arrive in. Pure.

Watches replay and lag behind our own writes, and kopf handles a deletion concurrently with the re-creation. So nothing
here depends on order: the higher version wins, and an object known to be deleted stays deleted.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Set
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_REMEMBERED = 20_000
"""How many deleted objects are remembered: far more than a watch replays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Generic[V]):
    """One object."""

    uid: str
    version: int
    """resourceVersion. Comparable across all objects of a kind."""
    value: V


class Store(Generic[K, V]):
    """Objects by name."""

    def __init__(self) -> None:
        self._entries: dict[K, Entry[V]] = {}
        self._gone: OrderedDict[str, int] = OrderedDict()
        """uid of a deleted object -> its last version."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def get(self, key: K) -> V | None:
        """The newest value of an object."""
        entry = self._entries.get(key)
        return entry.value if entry is not None else None

    def put(self, key: K, entry: Entry[V]) -> bool:
        """Store an object; False if it is stale or known to be deleted."""
        known = self._entries.get(key)
        if entry.version <= self._gone.get(entry.uid, -1) or (known is not None and entry.version <= known.version):
            return False
        if known is not None and known.uid != entry.uid:
            self._bury(known.uid, version=entry.version)
        self._entries[key] = entry
        return True

    def drop(self, key: K, *, uid: str, version: int) -> V | None:
        """Drop an object as of a version; returns its value if it was stored. A recreated object of that name stays."""
        self._bury(uid, version=version)
        known = self._entries.get(key)
        if known is None or known.uid != uid or known.version > version:
            return None
        return self._entries.pop(key).value

    def keep_only(self, uids: Set[str], *, version: int) -> list[tuple[K, V]]:
        """Drop and return what a list of that version does not contain. Anything newer than the list stays."""
        gone = [(key, e) for key, e in self._entries.items() if e.uid not in uids and e.version <= version]
        for key, entry in gone:
            self.drop(key, uid=entry.uid, version=version)
        return [(key, entry.value) for key, entry in gone]

    def _bury(self, uid: str, *, version: int) -> None:
        self._gone[uid] = max(version, self._gone.pop(uid, -1))
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
