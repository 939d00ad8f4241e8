"""The newest version of every object of one kind, whatever order its news comes in.

Watches are replayed, lag behind one's own writes, and kopf handles an object that is deleted beside the one that takes
its name. So nothing here depends on order: versions say which news is newer, and what is known to be gone stays gone.
Pure; ``caches`` and ``runs`` build on it.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Set
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_REMEMBERED = 20_000
"""Objects of which it is remembered that they are gone: far more than a watch replays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Generic[V]):
    """One object."""

    uid: str
    version: int
    """resourceVersion; the numbers of a kind compare, over all its objects."""
    value: V


class Store(Generic[K, V]):
    """Objects by name."""

    def __init__(self) -> None:
        self._entries: dict[K, Entry[V]] = {}
        self._gone: OrderedDict[str, int] = OrderedDict()
        """uid -> the last version of an object that is gone."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def get(self, key: K) -> V | None:
        """The newest value of an object."""
        entry = self._entries.get(key)
        return entry.value if entry is not None else None

    def put(self, key: K, entry: Entry[V]) -> bool:
        """Remember an object; False if this is no news: as new is known of its name, or it is gone."""
        known = self._entries.get(key)
        if entry.version <= self._gone.get(entry.uid, -1) or (known is not None and entry.version <= known.version):
            return False
        if known is not None and known.uid != entry.uid:
            self._bury(known.uid, version=entry.version)
        self._entries[key] = entry
        return True

    def drop(self, key: K, *, uid: str, version: int) -> V | None:
        """Forget an object as of a version; returns it if it was known, and leaves another that has its name now."""
        self._bury(uid, version=version)
        known = self._entries.get(key)
        if known is None or known.uid != uid or known.version > version:
            return None
        return self._entries.pop(key).value

    def keep_only(self, uids: Set[str], *, version: int) -> list[tuple[K, V]]:
        """Forget what a list of a version does not have; returns that. What is newer than the list is kept."""
        gone = [(key, e) for key, e in self._entries.items() if e.uid not in uids and e.version <= version]
        for key, entry in gone:
            self.drop(key, uid=entry.uid, version=version)
        return [(key, entry.value) for key, entry in gone]

    def _bury(self, uid: str, *, version: int) -> None:
        self._gone[uid] = max(version, self._gone.pop(uid, -1))
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
