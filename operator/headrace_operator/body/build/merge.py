"""Merge pod templates the way platform engineers expect.

Dicts merge; lists of named entries merge by name (volume mounts by path); tolerations and envFrom are appended;
anything else is replaced by ``over``.
"""

from typing import Any

_IDENTITIES = {"volumeMounts": "mountPath", "volumeDevices": "devicePath", "hostAliases": "ip"}
"""List field -> the key that identifies its entries, where it is not ``name``."""
_ADDED = frozenset({"tolerations", "envFrom"})
"""List fields whose entries have no identity: appended."""
_SOURCES = frozenset(
    {"configMap", "csi", "emptyDir", "ephemeral", "hostPath", "nfs", "persistentVolumeClaim", "projected", "secret"}
    | {"value", "valueFrom"}
)
"""A volume or variable has exactly one of these; the one in ``over`` replaces the one in ``under``."""


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` merged onto ``under``; neither is modified."""
    merged = {k: v for k, v in under.items() if k not in _SOURCES or k in over or _SOURCES.isdisjoint(over)}
    for field, value in over.items():
        merged[field] = _merged(field, merged[field], value) if field in merged else value
    return merged


def _merged(field: str, under: Any, over: Any) -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        return merge(under, over)
    if isinstance(under, list) and isinstance(over, list):
        return _merged_list(field, under, over)
    return over


def _merged_list(field: str, under: list[Any], over: list[Any]) -> list[Any]:
    if field in _ADDED:
        return [*under, *(entry for entry in over if entry not in under)]
    identity = _IDENTITIES.get(field, "name")
    if not all(isinstance(entry, dict) and identity in entry for entry in [*under, *over]):
        return over
    entries = {entry[identity]: entry for entry in under}
    for entry in over:
        entries[entry[identity]] = merge(entries.get(entry[identity], {}), entry)
    return list(entries.values())
