"""The TrainingRuns and TrainingRuntimes that the API server has, as it last sent them.

In: raw objects from watches and from one's own writes. Out: the newest of each.
"""

from collections import defaultdict
from collections.abc import Iterator

from headrace_operator.body.caches import RunKey
from headrace_operator.body.kube import Raw, version_of

_UNREAD = ("managedFields",)


def key_of(raw: Raw) -> RunKey:
    """The name of a run."""
    return RunKey(raw["metadata"]["namespace"], raw["metadata"]["name"])


def runtime_of(raw: Raw) -> str:
    """The name of the runtime that a run wants."""
    return str(raw.get("spec", {}).get("runtime", "default"))


class Runs:
    """TrainingRuns by key, and by the runtime that they name."""

    def __init__(self) -> None:
        self._runs: dict[RunKey, Raw] = {}
        self._by_runtime: dict[str, set[RunKey]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Raw]:
        return iter(self._runs.values())

    def put(self, raw: Raw) -> bool:
        """Remember a run; False if this version, or a newer one, is known."""
        key, known = key_of(raw), self.get(key_of(raw))
        if (
            known is not None
            and known["metadata"]["uid"] == raw["metadata"]["uid"]
            and version_of(known) >= version_of(raw)
        ):
            return False
        self.drop(key)
        self._runs[key] = _trimmed(raw)
        self._by_runtime[runtime_of(raw)].add(key)
        return True

    def drop(self, key: RunKey) -> None:
        """Forget a run."""
        known = self._runs.pop(key, None)
        if known is not None:
            self._by_runtime[runtime_of(known)].discard(key)

    def get(self, key: RunKey) -> Raw | None:
        """A run as the API server has it."""
        return self._runs.get(key)

    def with_runtime(self, name: str) -> tuple[RunKey, ...]:
        """The runs that name a runtime."""
        return tuple(self._by_runtime.get(name, ()))


def _trimmed(raw: Raw) -> Raw:
    metadata = {k: v for k, v in raw["metadata"].items() if k not in _UNREAD}
    return {**raw, "metadata": metadata}
