"""TrainingRuns as the API server last sent them.

In: raw objects from watches and from our own writes. Out: the newest version of each.
"""

from collections import defaultdict
from collections.abc import Iterator, Set

from headrace_operator.body.caches import RunKey
from headrace_operator.body.kube import version_of
from headrace_operator.body.raw import Raw
from headrace_operator.body.store import Entry, Store

_UNREAD = ("managedFields",)


def key_of(raw: Raw) -> RunKey:
    return RunKey(raw["metadata"]["namespace"], raw["metadata"]["name"])


def uid_of(raw: Raw) -> str:
    """Tells a run from an earlier one of the same name."""
    return str(raw["metadata"]["uid"])


def runtime_of(raw: Raw) -> str:
    """The name of the runtime that a run uses."""
    return str(raw.get("spec", {}).get("runtime", "default"))


class Runs:
    """TrainingRuns, by key and by runtime."""

    def __init__(self) -> None:
        self._store: Store[RunKey, Raw] = Store()
        self._by_runtime: dict[str, set[RunKey]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._store)

    def __iter__(self) -> Iterator[RunKey]:
        return iter(self._store)

    def put(self, raw: Raw) -> bool:
        """Store a run; False if it is stale."""
        key, known = key_of(raw), self.get(key_of(raw))
        if not self._store.put(key, Entry(uid=uid_of(raw), version=version_of(raw), value=_trimmed(raw))):
            return False
        if known is not None:
            self._by_runtime[runtime_of(known)].discard(key)
        self._by_runtime[runtime_of(raw)].add(key)
        return True

    def drop(self, key: RunKey, *, uid: str, version: int) -> None:
        """Drop a run as of a version. A recreated run of the same name stays."""
        dropped = self._store.drop(key, uid=uid, version=version)
        if dropped is not None:
            self._by_runtime[runtime_of(dropped)].discard(key)

    def keep_only(self, uids: Set[str], *, version: int) -> list[Raw]:
        """Drop the runs that a list of that version does not contain; returns them."""
        gone = self._store.keep_only(uids, version=version)
        for key, raw in gone:
            self._by_runtime[runtime_of(raw)].discard(key)
        return [raw for _, raw in gone]

    def get(self, key: RunKey) -> Raw | None:
        """A run as the API server last sent it."""
        return self._store.get(key)

    def with_runtime(self, name: str) -> tuple[RunKey, ...]:
        """The runs that use a runtime."""
        return tuple(self._by_runtime.get(name, ()))


def _trimmed(raw: Raw) -> Raw:
    metadata = {k: v for k, v in raw["metadata"].items() if k not in _UNREAD}
    return {**raw, "metadata": metadata}
